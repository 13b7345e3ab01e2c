import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chandlery.errors import StorageFullError
from chandlery.sources.trees import SourceTrees
from tests.support.source_trees import filled, making, revisions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sources" / "git-1"


@pytest.fixture
def trees(folder: Path) -> SourceTrees:
    return SourceTrees(folder, "git!here")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte; only root can make one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted")
    yield small
    subprocess.run(["umount", small], check=True)


async def test_a_real_full_disk_is_told_and_nothing_is_left(small_disk: Path) -> None:
    trees = SourceTrees(small_disk / "trees", "git!here")
    with pytest.raises(StorageFullError):
        await trees.make("a", filled("x" * (2 << 20)))
    assert revisions(small_disk / "trees") == making(small_disk / "trees") == []
    await trees.make("a", filled("small"))


async def test_a_kill_leaves_nothing_half_made_and_what_it_left_is_removed(
    trees: SourceTrees, folder: Path
) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path; from chandlery.sources.trees import *\n"
        "async def fill(target):\n"
        "    target.mkdir(); (target / 'half').touch(); print('half', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(SourceTrees(Path(sys.argv[1]), 's').make('a', fill))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(folder), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    assert await process.stdout.readline() == b"half\n"
    # While its maker lives, nobody takes it away.
    await trees.make("b", filled("b"))
    assert len(making(folder)) == 1
    process.kill()
    await process.wait()

    assert trees.get("a") is None
    await trees.make("a", filled("whole"))
    assert making(folder) == []
    assert (folder / "a/source/default.nix").read_text() == "whole"
