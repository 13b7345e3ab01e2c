import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chandlery.builds.sqlite.index import SqliteIndex, count
from chandlery.builds.sqlite.schema import file_of
from tests.support.build_index_contract import a_recipe, an_image, digest_of
from tests.support.older_build_index import OldFile, carried_over


@pytest.fixture
def old(tmp_path: Path) -> OldFile:
    return OldFile(tmp_path)


OPEN = """
import os
import sys
from pathlib import Path
from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.builds.sqlite.migrations import READERS, read_version_3

def read(old):
    for number, row in enumerate(read_version_3(old), start=1):
        yield row
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), 9)

READERS[3] = read
print("ready", flush=True)
sys.stdin.readline()
SqliteIndex(Path(sys.argv[1])).close()
"""


def opening(folder: Path, killed_at_row: int = 0) -> subprocess.Popen[str]:
    """Start a process that opens an index when it is told to; it may die when it has written so many rows."""
    arguments = [sys.executable, "-c", OPEN, str(folder), str(killed_at_row)]
    return subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


async def test_who_is_killed_in_the_middle_leaves_it_to_the_next(old: OldFile, tmp_path: Path) -> None:
    for number in range(20):
        old.add_image(a_recipe(f"p{number}"), an_image(f"{number}"))
    counts = count(tmp_path)
    for row in (1, 15):
        process = opening(tmp_path, row)
        process.communicate("go\n")
        assert process.returncode == -signal.SIGKILL
        assert file_of(tmp_path).exists()
        assert count(tmp_path) == counts
    assert carried_over(tmp_path)["images"] == 20


async def test_processes_that_start_at_once_carry_it_over_once(old: OldFile, tmp_path: Path) -> None:
    for number in range(50):
        old.add_image(a_recipe(f"p{number}"), an_image(f"{number}", "base"))
    processes = [opening(tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = await asyncio.gather(*(asyncio.to_thread(process.communicate, "go\n") for process in processes))
    assert [process.returncode for process in processes] == [0] * 4
    assert "".join(output for output, _ in outputs).count("is carried over") == 1
    with SqliteIndex(tmp_path) as index:
        assert (await index.references())[digest_of("base")] == 50
