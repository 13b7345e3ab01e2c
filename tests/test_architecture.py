"""The rules of docs/architecture.md that a reader can't see in one module."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import chandlery

# The rooms, top floor first: a module imports from its own room and from those below it.
ROOMS = (
    "__main__",
    "cli",
    "doctor",
    "demo",
    "server",
    "maintenance",
    "registry",
    "builds",
    "sources",
    "settings",
    "plan",
    "layers",
    "access",
    "nix",
    "storage",
    "image",
    "machine",
    "oci",
    "telemetry",
    "errors",
)

# What decides does no I/O and asks no clock, nor does anything that it imports: whole rooms, and modules.
PURE = (
    *("plan", "image", "errors", "access.rules", "access.authorization", "layers.alternatives"),
    "layers.package_relations",
    *("nix.closure", "nix.closure_json", "nix.pinned_source", "oci.digest", "oci.documents"),
    *("registry.negotiation", "registry.ranges", "settings.values", "sources.git.address"),
    *("storage.byte_range", "builds.limits"),
)
IMPURE = {
    *("anyio", "asyncio", "httpx", "io", "multiprocessing", "os", "pathlib", "shutil", "socket", "sqlite3"),
    *("subprocess", "tempfile", "threading", "time", "datetime", "random", "secrets", "structlog"),
}
# What names of the file system look like is no I/O.
NO_IO = {"pathlib.PurePath", "pathlib.PurePosixPath", "os.fsencode", "os.fsdecode"}

STARTS_PROGRAMS = {
    *("machine.program", "machine.process_pool"),
    "demo.demo",  # a server that goes on beside it
    "server.tls",  # a certificate is tried in a process of its own
}
STARTING = re.compile(
    r"subprocess\..*|multiprocessing\..*|os\.(system|popen|fork|forkpty|exec\w+|spawn\w+|posix_spawn\w*)"
    r"|asyncio(\.subprocess)?\.create_subprocess_\w+|anyio\.(run_process|open_process)|pty\..*"
)
# These say what a program is, and start none.
HARMLESS = {"asyncio.subprocess", "subprocess.PIPE", "subprocess.DEVNULL", "subprocess.CompletedProcess"}
# These pass the environment on to the programs that they run, and look for them on PATH.
READS_THE_ENVIRONMENT = {
    *("settings.settings", "nix.configuration", "sources.debian.apt", "sources.git.repository"),
    *("machine.process_pool", "demo.demo", "demo.sandbox", "server.tls"),
}
ENVIRONMENT = re.compile(r"os\.(environb?|getenvb?|putenv)(\..*)?")
LOCKING = re.compile(r"fcntl(\..*)?|os\.lockf")
# With these a check of imports could be walked around.
DYNAMIC = re.compile(r"importlib\.import_module|importlib\.__import__|runpy\..*")
NIX_PROGRAM = re.compile(r"nix-(store|build|instantiate|env|shell|channel|daemon|collect-garbage|hash)")

FOLDER = Path(chandlery.__file__).parent
DOCS = FOLDER.parent.parent / "docs"
TESTS = Path(__file__).parent
TREES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): ast.parse(path.read_text())
    for path in FOLDER.rglob("*.py")
    if path.stem != "__init__"
}
FLOOR = {room: number for number, room in enumerate(ROOMS)}

each_module = pytest.mark.parametrize("module", sorted(TREES))


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield what is imported anywhere in a module, dotted and whole, and the name that it gets there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                yield alias.name, alias.asname or whole
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Return the modules of Chandlery that a module imports."""
    found = set()
    for name, _ in imports(TREES[module]):
        package, _, rest = name.partition(".")
        # What is imported is a module, or something in it.
        found |= {rest, rest.rpartition(".")[0]} & TREES.keys() if package == "chandlery" else set()
    return found


def with_all_below(module: str) -> set[str]:
    """Return a module and what it imports, directly or not."""
    found, pending = set(), [module]
    while pending:
        each = pending.pop()
        if each not in found:
            found.add(each)
            pending += own_imports(each)
    return found


def used(tree: ast.Module) -> set[str]:
    """Return what a module uses of others, dotted and whole, whatever it calls them: `os.environ`."""
    local = {name: whole for whole, name in imports(tree)}
    found = {whole for whole, _ in imports(tree)}
    for node in ast.walk(tree):
        parts: list[str] = []
        value: ast.expr | ast.AST = node
        while isinstance(value, ast.Attribute):
            parts.insert(0, value.attr)
            value = value.value
        if parts and isinstance(value, ast.Name) and value.id in local:
            found.add(".".join([local[value.id], *parts]))
    return found


@each_module
def test_a_module_is_in_a_room(module: str) -> None:
    assert room_of(module) in ROOMS, f"add {room_of(module)} to ROOMS"
    *folders, _ = module.split(".")
    place = FOLDER
    for folder in folders:
        place /= folder
        face = ast.parse((place / "__init__.py").read_text())
        assert ast.get_docstring(face)
        assert len(face.body) == 1, "a room's __init__ says what the room is, and hands nothing on"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_on_the_map(room: str) -> None:
    assert room == "__main__" or f"`{room}`" in (DOCS / "architecture.md").read_text()


@each_module
def test_imports_run_downwards(module: str) -> None:
    upwards = {other for other in own_imports(module) if FLOOR[room_of(other)] < FLOOR[room_of(module)]}
    assert not upwards


def test_no_imports_run_in_a_circle() -> None:
    TopologicalSorter({module: own_imports(module) for module in TREES}).prepare()


@pytest.mark.parametrize("module", [each for each in sorted(TREES) if {each, room_of(each)} & {*PURE}])
def test_what_decides_does_no_io(module: str) -> None:
    impure = {
        f"{each} uses {name}"
        for each in with_all_below(module)
        for name in used(TREES[each]) - {"os", "pathlib"} - NO_IO
        if name.partition(".")[0] in IMPURE
    }
    assert not impure


@each_module
def test_only_the_settings_are_read_from_the_environment(module: str) -> None:
    read = {name for name in used(TREES[module]) if ENVIRONMENT.fullmatch(name)}
    assert not read or module in READS_THE_ENVIRONMENT


@each_module
def test_few_modules_start_programs(module: str) -> None:
    starting = {name for name in used(TREES[module]) if STARTING.fullmatch(name)} - HARMLESS
    assert not starting or module in STARTS_PROGRAMS


@each_module
def test_only_one_module_locks_files(module: str) -> None:
    locking = {name for name in used(TREES[module]) if LOCKING.fullmatch(name)}
    assert not locking or module == "machine.locks"


@each_module
def test_what_is_imported_stands_in_an_import(module: str) -> None:
    assert not {name for name in used(TREES[module]) if DYNAMIC.fullmatch(name)}
    calls = {node.id for node in ast.walk(TREES[module]) if isinstance(node, ast.Name)}
    assert not calls & {"__import__", "exec", "eval"}


@each_module
def test_nothing_of_the_product_needs_the_demo(module: str) -> None:
    demo = {each for each in own_imports(module) if room_of(each) == "demo"}
    assert not demo or room_of(module) == "demo" or module == "cli.demo"


@each_module
def test_only_one_module_calls_nix(module: str) -> None:
    called = {
        node.value
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and NIX_PROGRAM.fullmatch(node.value)
    }
    assert bool(called) == (module == "nix.nix")


@pytest.mark.parametrize("file", [str(path.relative_to(TESTS)) for path in sorted(TESTS.rglob("*.py"))])
def test_a_test_imports_no_other_test(file: str) -> None:
    imported = [name for name, _ in imports(ast.parse((TESTS / file).read_text()))]
    assert all(name.startswith("tests.support") for name in imported if name.startswith("tests."))
