import os
from pathlib import Path

import pytest

from chandlery.nix.closure import StorePath
from chandlery.nix.unfinished import left_sandboxes, unfinished_bytes


def path(name: str) -> StorePath:
    return StorePath.parse(f"/nix/store/{'0' * 32}-{name}")


DERIVATION, OUTPUT = path("git.drv"), path("git")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def size(store: Path) -> int:
    return unfinished_bytes(
        store, store.parent / "scratch", [(DERIVATION, OUTPUT), (path("other.drv"), path("other"))]
    )


def write(file: Path, size: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(size))
    return file


def test_what_a_builder_writes_counts_wherever_it_does(store: Path) -> None:
    assert size(store) == 0
    sandbox = store / f"{DERIVATION.base_name}.chroot"
    write(sandbox / "nix/store" / OUTPUT.base_name / "bin/git", 100)
    write(sandbox / "tmp/scratch", 20)
    write(store.parent / "scratch/nix-build-git.drv-0/object", 3)
    write(store / f"{path('foreign.drv').base_name}.chroot/large", 1000)
    assert size(store) == 123
    assert left_sandboxes(store) == [f"{path(name).base_name}.chroot" for name in ("foreign.drv", "git.drv")]


@pytest.mark.parametrize("name", ["", "bin/git"])
def test_what_is_unpacked_counts_as_far_as_it_is_there(store: Path, name: str) -> None:
    write(store / OUTPUT.base_name / name if name else store / OUTPUT.base_name, 100)
    assert size(store) == 100


def test_a_builders_inputs_are_links_and_do_not_count_but_its_own_links_do_once(store: Path) -> None:
    sandbox = store / f"{DERIVATION.base_name}.chroot"
    source = write(store / path("source").base_name, 1000)
    own = write(sandbox / "nix/store" / OUTPUT.base_name / "a", 100)
    os.link(source, sandbox / "source")
    os.link(own, own.with_name("b"))
    (own.parent / "c").symlink_to("a")
    assert size(store) == 100 + len("a")


def test_folders_may_be_as_deep_as_a_builder_likes(store: Path) -> None:
    sandbox = store / f"{DERIVATION.base_name}.chroot"
    upper, lower = sandbox / "/".join("d" * 600), store / "lower"
    upper.mkdir(parents=True)
    write(lower / "/".join("d" * 600) / "file", 100)
    lower.rename(upper / "d")
    assert size(store) == 100
    # pytest can't remove it.
    (upper / "d").rename(lower)


def test_a_store_that_is_not_there_has_nothing(tmp_path: Path) -> None:
    assert left_sandboxes(tmp_path / "gone") == []
    assert unfinished_bytes(tmp_path / "gone", tmp_path / "gone", [(DERIVATION, OUTPUT)]) == 0
