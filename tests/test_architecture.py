"""The rules of docs/architecture.md that a reader can't see in one module."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import chandlery

# A module may import from its own row and from those below it, and no two import each other.
LAYERS = (
    "__main__",
    "cli.main",
    "cli.maintenance cli.plan cli.settings",
    "doctor.checks",
    "demo.demo server.app maintenance.background",
    "settings.settings",
    "settings.nixery settings.problems",
    "doctor.examination settings.places",
    "cli.options doctor.certificate settings.values",
    "server.monitoring server.readiness server.tracing",
    "server.worker_reports",
    "registry.api registry.endpoint demo.registry_client server.request_log "
    "registry.waiting demo.sandbox oci.layout registry.response_cache",
    "registry.token_endpoint access.control access.client_address "
    "access.public_address access.users access.tokens server.tls",
    "maintenance.repaired_blobs maintenance.scrub maintenance.garbage_collector maintenance.status",
    "builds.images",
    "sources.configured",
    "builds.pipeline",
    "builds.speculative_packing",
    "builds.build_queue builds.index builds.resolver builds.popularity_tables",
    "builds.unfinished",
    "builds.build builds.locks builds.failures",
    "builds.recipe storage.leases layers.root_layer",
    "nix.nix",
    "nix.database nix.evaluation nix.store_lock "
    "layers.archive layers.root_filesystem layers.store_reader storage.blob_store "
    "storage.object_store",
    "plan.strategies sources.package_source layers.alternatives layers.compression sources.binary_cache",
    "plan.grouped plan.peers plan.by_size plan.pull_simulation",
    "plan.layer_group",
    "sources.path sources.nixpkgs sources.flake sources.git.source sources.debian.source",
    "sources.arguments sources.debian.index",
    "sources.operator_folder sources.debian.snapshot",
    "plan.package_clusters",
    "plan.package_graph plan.popularity",
    "sources.pins sources.folder_content machine.download "
    "machine.tarball sources.negative_cache sources.trees sources.git.repository",
    "machine.data_folder machine.process_pool machine.token_buckets",
    "nix.configuration nix.process",
    "access.rules access.authorization nix.log nix.output",
    "nix.closure_json telemetry.build_timings",
    "nix.pinned_source nix.closure image.name registry.negotiation storage.bucket sources.git.address",
    "image.profile",
    "oci.documents storage.byte_range telemetry.logs telemetry.metrics registry.lru_cache",
    "oci.digest machine.niceness machine.process_pool_worker layers.prefetch",
    "errors",
)

# What decides does no I/O, and asks no clock.
PURE = (
    "access.rules layers.alternatives access.authorization registry.lru_cache storage.byte_range "
    "nix.closure nix.closure_json errors sources.git.address plan.grouped image.name image.profile "
    "plan.layer_group plan.strategies registry.negotiation oci.documents plan.package_graph "
    "plan.package_clusters plan.peers nix.pinned_source plan.popularity plan.pull_simulation "
    "settings.values plan.by_size"
)
IMPURE_IMPORTS = {
    *("anyio", "asyncio", "httpx", "io", "multiprocessing", "os", "shutil", "socket", "sqlite3"),
    *("subprocess", "tempfile", "threading", "time", "datetime", "random", "secrets"),
}

STARTS_PROGRAMS = (
    "machine.process_pool nix.process nix.configuration sources.debian.index demo.sandbox demo.demo "
    "sources.git.repository"
)
# These pass the environment on to the programs that they start, and look for them on PATH.
PASSES_THE_ENVIRONMENT_ON = STARTS_PROGRAMS
NIX_PROGRAM = re.compile(r"nix-(store|build|instantiate|env|shell|channel|daemon|collect-garbage|hash)")

FOLDER = Path(chandlery.__file__).parent
TREES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): ast.parse(path.read_text())
    for path in FOLDER.rglob("*.py")
    if path.stem != "__init__"
}
ROW = {module: number for number, row in enumerate(LAYERS) for module in row.split()}

each_module = pytest.mark.parametrize("module", sorted(TREES))


def imports(tree: ast.Module) -> Iterator[str]:
    """Give the modules that are imported anywhere in a module, dotted and whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Give the modules of Chandlery that a module imports."""
    found = set()
    for name in imports(TREES[module]):
        package, _, rest = name.partition(".")
        # What is imported is a module, or something in it.
        found |= {rest, rest.rpartition(".")[0]} & TREES.keys() if package == "chandlery" else set()
    return found


def attributes(tree: ast.Module) -> set[str]:
    """Give what is read from names, as it is written: `os.environ`."""
    return {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }


@each_module
def test_a_module_is_on_the_map(module: str) -> None:
    text = (FOLDER.parent.parent / "docs" / "architecture.md").read_text()
    assert f"`{module}`" in text or module == "__main__"


@each_module
def test_a_module_has_its_place(module: str) -> None:
    assert module in ROW, f"add {module} to LAYERS"


@each_module
def test_imports_run_downwards(module: str) -> None:
    upwards = {other for other in own_imports(module) if ROW[other] < ROW[module]}
    assert not upwards


def test_no_imports_run_in_a_circle() -> None:
    TopologicalSorter({module: own_imports(module) for module in TREES}).prepare()


@pytest.mark.parametrize("module", PURE.split())
def test_what_decides_does_no_io(module: str) -> None:
    imported = {name.partition(".")[0] for name in imports(TREES[module])}
    assert not imported & IMPURE_IMPORTS


@each_module
def test_only_the_settings_are_read_from_the_environment(module: str) -> None:
    read = attributes(TREES[module]) & {"os.environ", "os.environb", "os.getenv"}
    assert not read or module in ("settings.settings", *PASSES_THE_ENVIRONMENT_ON.split())


@each_module
def test_few_modules_start_programs(module: str) -> None:
    starting = {
        *("subprocess.run", "subprocess.Popen", "subprocess.check_output", "os.system", "os.execv"),
        *("asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell", "anyio.run_process"),
    }
    assert not attributes(TREES[module]) & starting or module in STARTS_PROGRAMS.split()


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


TESTS = Path(__file__).parent
each_test_file = pytest.mark.parametrize(
    "file", [str(path.relative_to(TESTS)) for path in sorted(TESTS.rglob("*.py"))]
)


@each_test_file
def test_a_test_imports_no_other_test(file: str) -> None:
    imported = [name for name in imports(ast.parse((TESTS / file).read_text())) if name.startswith("tests.")]
    assert all(name.startswith("tests.support.") for name in imported)
