import asyncio
import errno
import os
from pathlib import Path

import pytest

from chandlery.errors import StorageError, StorageFullError, TooManyReferencesError
from chandlery.sources.trees import SourceTrees
from tests.support.clock import Clock
from tests.support.source_trees import filled, making, revisions

HOUR = 3600.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sources" / "git-1"


@pytest.fixture
def trees(folder: Path, clock: Clock) -> SourceTrees:
    return SourceTrees(folder, "git!here", most=3, most_in_use=10, in_use_for=HOUR, clock=clock)


async def test_a_tree_is_made_once_and_named_source(trees: SourceTrees, folder: Path) -> None:
    assert trees.get("a") is None

    made = await trees.make("a", filled("a"))

    assert made == folder / "a" / "source" == trees.get("a")
    assert await trees.make("a", filled("another")) == made
    assert (made / "default.nix").read_text() == "a"
    assert making(folder) == []


async def test_many_who_ask_for_one_revision_make_it_once(trees: SourceTrees) -> None:
    made: list[Path] = []

    async def fill(target: Path) -> None:
        made.append(target)
        await asyncio.sleep(0)
        target.mkdir()

    assert len(set(await asyncio.gather(*(trees.make("a", fill) for _ in range(10))))) == 1
    assert len(made) == 1


async def test_what_cannot_be_made_leaves_nothing_and_the_next_one_tries(
    trees: SourceTrees, folder: Path
) -> None:
    async def fail(target: Path) -> None:
        await filled("half")(target)
        raise RuntimeError("the server hung up")

    results = await asyncio.gather(
        trees.make("a", fail), trees.make("a", filled("whole")), return_exceptions=True
    )

    assert isinstance(results[0], RuntimeError)
    assert (folder / "a/source/default.nix").read_text() == "whole"
    assert making(folder) == []


async def test_a_full_disk_is_told_and_nothing_is_left(trees: SourceTrees, folder: Path) -> None:
    async def fail(target: Path) -> None:
        await filled("half")(target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with pytest.raises(StorageFullError):
        await trees.make("a", fail)
    assert revisions(folder) == making(folder) == []


async def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StorageError):
        await SourceTrees(tmp_path / "file" / "trees", "git!here").make("a", filled("a"))


async def test_one_who_is_cancelled_leaves_nothing_half_made(trees: SourceTrees, folder: Path) -> None:
    begun = asyncio.Event()

    async def fill(target: Path) -> None:
        await filled("half")(target)
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(trees.make("a", fill))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert revisions(folder) == making(folder) == []


# What goes


async def made_one_after_another(trees: SourceTrees, clock: Clock, names: str, apart: float) -> None:
    for name in names:
        await trees.make(name, filled(name))
        clock.now += apart


async def test_the_newest_are_kept(trees: SourceTrees, folder: Path, clock: Clock) -> None:
    await made_one_after_another(trees, clock, "abcde", 2 * HOUR)
    assert revisions(folder) == ["c", "d", "e"]
    assert making(folder) == []


async def test_of_older_ones_those_are_kept_that_are_wanted(
    trees: SourceTrees, folder: Path, clock: Clock
) -> None:
    await made_one_after_another(trees, clock, "abc", 2 * HOUR)
    trees.keep(["unknown", "a", "b"])
    await made_one_after_another(trees, clock, "d", 2 * HOUR)
    assert revisions(folder) == ["a", "b", "d"]

    trees.keep(["b"])
    await made_one_after_another(trees, clock, "e", 2 * HOUR)
    assert revisions(folder) == ["b", "d", "e"]


async def test_what_was_handed_out_lately_stays_whatever_comes(
    trees: SourceTrees, folder: Path, clock: Clock
) -> None:
    await trees.make("a", filled("a"))
    clock.now += 2 * HOUR
    assert trees.get("a")
    await made_one_after_another(trees, clock, "bcdef", HOUR / 10)
    assert revisions(folder) == ["a", "b", "c", "d", "e", "f"]

    clock.now += 2 * HOUR
    await trees.make("g", filled("g"))
    assert revisions(folder) == ["e", "f", "g"]


async def test_what_another_process_handed_out_stays_too(
    trees: SourceTrees, folder: Path, clock: Clock
) -> None:
    await made_one_after_another(trees, clock, "abc", 2 * HOUR)
    SourceTrees(folder, "git!here", clock=clock).get("a")
    await trees.make("d", filled("d"))

    assert "a" in revisions(folder)


async def test_a_client_cannot_fill_the_disk_with_revisions(
    trees: SourceTrees, folder: Path, clock: Clock
) -> None:
    await made_one_after_another(trees, clock, "abcdefghij", 1.0)
    with pytest.raises(TooManyReferencesError):
        await trees.make("k", filled("k"))
    assert await trees.make("a", filled("a"))

    clock.now += 2 * HOUR
    await trees.make("k", filled("k"))
    assert len(revisions(folder)) == 3


def test_only_one_revision_begins_so(trees: SourceTrees, folder: Path) -> None:
    for name in ("abc1", "abc2", "def"):
        (folder / name / "source").mkdir(parents=True)
    (folder / "half").mkdir()

    assert trees.revision("de") == "def"
    assert trees.revision("abc1") == "abc1"
    assert trees.revision("abc") is None
    assert trees.revision("half") is None
    assert trees.revision("x") is None
