import asyncio
import sys
from pathlib import Path

from chandlery.builds.locks import FileBuildLocks

LOCK_AND_WAIT = """
import asyncio, sys, time
from pathlib import Path
from chandlery.builds.locks import FileBuildLocks

async def lock():
    locks = FileBuildLocks(Path(sys.argv[1]), 1)
    held = await locks.acquire("git", "build-1"), await locks.slot()
    print("locked", flush=True)
    time.sleep(60)

asyncio.run(lock())
"""


async def test_what_a_process_had_is_free_when_it_is_killed(tmp_path: Path) -> None:
    here = FileBuildLocks(tmp_path, 2)
    await here.open()
    argv = [sys.executable, "-c", LOCK_AND_WAIT, str(tmp_path)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    assert await process.stdout.readline() == b"locked\n"
    assert await here.owner("git") == "build-1"
    process.kill()
    await process.wait()
    assert await here.owner("git") is None
    await here.open()
    assert not list(tmp_path.glob("*.building"))
    assert await here.slot()
    assert await here.slot()
