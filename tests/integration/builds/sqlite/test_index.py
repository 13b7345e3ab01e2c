import asyncio
import subprocess
import sys
from pathlib import Path

from chandlery.builds.sqlite.index import SqliteIndex

OPEN_AND_REMEMBER = """
import asyncio
import sys
from pathlib import Path
from chandlery.builds.sqlite.index import SqliteIndex

async def remember():
    with SqliteIndex(Path(sys.argv[1])) as index:
        for number in range(20):
            await index.remember_resolutions("pin", {f"{sys.argv[2]} {number}": b"{}"})

sys.stdin.readline()
asyncio.run(remember())
"""


def test_processes_that_start_at_once_share_an_index(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_AND_REMEMBER, str(tmp_path), name], stdin=subprocess.PIPE
        )
        for name in "abcd"
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    wanted = [f"{name} {number}" for name in "abcd" for number in range(20)]
    with SqliteIndex(tmp_path) as index:
        assert sorted(asyncio.run(index.resolutions("pin", wanted))) == sorted(wanted)
