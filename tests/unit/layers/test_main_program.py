from pathlib import Path

import pytest

from chandlery.image.name import ImageRequest
from chandlery.layers.main_program import (
    MainPackage,
    main_package,
    main_program,
    main_program_of,
    program_named,
)
from chandlery.layers.store_reader import StoreReader
from chandlery.nix.evaluation import Resolution
from chandlery.oci.documents import Platform
from tests.support.physical_store import Executable, Link, PhysicalStore, closure_of

PROGRAM = Executable()


@pytest.fixture
def store(tmp_path: Path) -> PhysicalStore:
    return PhysicalStore(tmp_path / "nix/store")


def request_of(*packages: str) -> ImageRequest:
    return ImageRequest(packages, Platform("linux", "amd64"))


def resolution(name: str, main: str | None = None) -> Resolution:
    outputs = {"out": f"/nix/store/{'0' * 32}-{name}"}
    return Resolution(status="found", pname=name, main_program=main, output="out", outputs=outputs)


def test_an_image_of_one_package_has_a_main_package_and_another_has_none() -> None:
    found = {name: resolution(name, f"{name}-main") for name in ("git", "jq", "cacert")}
    main = main_package(request_of("git"), found)
    assert main is not None
    assert (main.name, main.main_program) == ("git", "git-main")
    assert main.store_path == found["git"].store_path
    assert main_package(request_of("git", "jq"), found) is None
    assert main_package(request_of(), found) is None


def test_a_program_of_the_packages_name_may_be_in_what_the_package_needs(store: PhysicalStore) -> None:
    """As Debian's python3 is a link in python3-minimal."""
    minimal = store.add("minimal", {"usr/bin/python3": PROGRAM, "nix-support/image-layout": b"root"})
    python3 = store.add("python3", {"usr/share/doc": b"", "nix-support/image-layout": b"root"})
    closure = closure_of(python3, minimal)
    main = MainPackage(python3, "python3", None)
    assert main_program_of(StoreReader(store.store_root), closure, main) == "/usr/bin/python3"


@pytest.mark.parametrize(
    ("programs", "declared", "package", "expected"),
    [
        (["rg", "other"], "rg", "ripgrep", "/bin/rg"),
        (["git", "git-shell"], None, "git", "/bin/git"),
        (["git", "git-shell"], "missing", "git", "/bin/git"),
        (["rg"], None, "ripgrep", "/bin/rg"),
        (["rg", ".rg-wrapped"], None, "ripgrep", "/bin/rg"),
        (["a", "b"], None, "c", None),
        ([], "declared", "package", None),
    ],
)
def test_the_program_is_the_declared_one_or_the_packages_or_the_only_one(
    store: PhysicalStore, programs: list[str], declared: str | None, package: str, expected: str | None
) -> None:
    tree: dict[str, bytes | Executable | Link | None] = {f"bin/{name}": PROGRAM for name in programs}
    built = store.add("package", {**tree, "bin/data": b"not executable", "bin/folder": None})

    assert main_program(StoreReader(store.store_root), [built], declared, package) == expected


def test_the_root_layout_has_its_programs_below_usr(store: PhysicalStore) -> None:
    reader = StoreReader(store.store_root)
    sl = store.add_root_layout("sl", {"usr/games/sl": PROGRAM, "bin/ignored": PROGRAM})
    cron = store.add_root_layout("cron", {"usr/bin/crontab": PROGRAM, "usr/sbin/cron": PROGRAM})

    assert main_program(reader, [sl], None, "sl") == "/usr/games/sl"
    assert main_program(reader, [cron], None, "cron") == "/usr/sbin/cron"
    assert main_program(reader, [cron, sl], "sl", "cron") == "/usr/games/sl"


def test_a_program_of_a_name_is_found_in_what_stands_at_the_root_alone(store: PhysicalStore) -> None:
    reader = StoreReader(store.store_root)
    python3 = store.add_root_layout("python3", {"usr/bin/pydoc3": PROGRAM, "usr/bin/pdb3": PROGRAM})
    minimal = store.add_root_layout("python3-minimal", {"usr/bin/python3": PROGRAM})
    elsewhere = store.add("elsewhere", {"bin/python3": PROGRAM})

    assert program_named(reader, [python3, minimal], "python3") == "/usr/bin/python3"
    # What has the store layout and wasn't asked for is linked from nowhere.
    assert program_named(reader, [python3, elsewhere], "python3") is None


def test_a_folder_of_programs_may_be_a_link(store: PhysicalStore) -> None:
    real = store.add("real", {"bin/python3": Link("python3.11"), "bin/python3.11": PROGRAM})
    environment = store.add("environment", {"bin": Link(f"{real}/bin")})

    assert main_program(StoreReader(store.store_root), [environment], "python3", "env") == "/bin/python3"
