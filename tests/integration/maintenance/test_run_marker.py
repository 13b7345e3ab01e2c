import os
import subprocess
import sys
import time
from pathlib import Path

from chandlery.maintenance.run_marker import RunMarker

RUN_AND_DIE = """
import os, sys
from pathlib import Path
from chandlery.maintenance.run_marker import RunMarker

marker = RunMarker(Path(sys.argv[1]))
marker.begin()
if "whole" in sys.argv:
    marker.whole()
os.kill(os.getpid(), 9)
"""


def test_after_kills_everything_is_in_doubt_since_the_last_time_it_was_known_to_be_whole(
    tmp_path: Path,
) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-c", RUN_AND_DIE, str(tmp_path)], check=False)
        os.utime(tmp_path / "running", (1000, 1000))
    for _ in range(2):
        marker = RunMarker(tmp_path)
        assert marker.begin() == 1000
        marker.end()
    subprocess.run([sys.executable, "-c", RUN_AND_DIE, str(tmp_path), "whole"], check=False)
    since = RunMarker(tmp_path).begin()
    assert since is not None
    assert since > time.time() - 60


def test_after_a_crash_everybody_who_begins_learns_what_is_in_doubt_until_it_was_checked(
    tmp_path: Path,
) -> None:
    subprocess.run([sys.executable, "-c", RUN_AND_DIE, str(tmp_path)], check=False)
    os.utime(tmp_path / "running", (1000, 1000))
    first, second, third = (RunMarker(tmp_path) for _ in range(3))
    assert (first.begin(), second.begin()) == (1000, 1000)
    first.whole()
    assert third.begin() is None
    for each in (first, second, third):
        each.end()
    assert not list(tmp_path.iterdir())
