import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chandlery.errors import StorageError
from chandlery.machine.data_folder import RunMarker, TemporaryFolder

HOLD_A_FOLDER = """
import sys
from pathlib import Path
from chandlery.machine.data_folder import TemporaryFolder

folder = TemporaryFolder(Path(sys.argv[1]))
(folder.path / "half").write_text("half")
print(folder.path, flush=True)
sys.stdin.read()
"""


def hold_a_folder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_A_FOLDER, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_live_process_writes_is_left_alone_and_what_a_dead_one_left_is_removed(tmp_path: Path) -> None:
    process, folder = hold_a_folder(tmp_path)
    with process:
        with TemporaryFolder(tmp_path):
            assert (folder / "half").exists()
        process.kill()
        process.wait()
        assert (folder / "half").exists()
        with TemporaryFolder(tmp_path):
            assert not folder.exists()


def test_a_process_that_died_before_it_had_its_lock_left_nothing_for_ever(tmp_path: Path) -> None:
    half_made = tmp_path / "123-abc"
    half_made.mkdir()
    with TemporaryFolder(tmp_path):
        assert not half_made.exists()


def test_closing_removes_the_folder(tmp_path: Path) -> None:
    with TemporaryFolder(tmp_path) as folder, folder.file() as file:
        file.write_text("something")
        (folder.path / "other").write_text("something else")
    assert not folder.path.exists()


def test_two_folders_of_one_process_live_together(tmp_path: Path) -> None:
    with TemporaryFolder(tmp_path) as first, TemporaryFolder(tmp_path) as second:
        assert first.path.is_dir()
        assert second.path.is_dir()


def test_what_died_later_is_swept_on_demand(tmp_path: Path) -> None:
    with TemporaryFolder(tmp_path) as folder:
        process, other = hold_a_folder(tmp_path)
        with process:
            folder.sweep()
            assert other.exists()
            process.kill()
            process.wait()
        folder.sweep()
        assert not other.exists()
        assert folder.path.exists()


def test_after_a_clean_end_nothing_is_in_doubt(tmp_path: Path) -> None:
    for _ in range(2):
        marker = RunMarker(tmp_path)
        assert marker.begin() is None
        marker.end()


RUN_AND_DIE = """
import os, sys
from pathlib import Path
from chandlery.machine.data_folder import RunMarker

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


def test_a_server_that_takes_over_from_one_that_still_runs_follows_no_crash(tmp_path: Path) -> None:
    first, second, third = (RunMarker(tmp_path) for _ in range(3))
    assert first.begin() is None
    assert second.begin() is None
    first.end()
    assert (tmp_path / "running").exists()
    second.end()
    assert third.begin() is None
    third.end()


def test_a_parent_that_can_not_be_made_says_what_to_do() -> None:
    with pytest.raises(
        StorageError, match=r"let the user that runs chandlery write there, or choose another"
    ):
        TemporaryFolder(Path("/sys/chandlery/tmp"))
