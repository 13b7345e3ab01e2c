import subprocess
import sys
from pathlib import Path

import pytest

from chandlery.errors import StorageError
from chandlery.machine.temporary_folder import TemporaryFolder

HOLD_A_FOLDER = """
import sys
from pathlib import Path
from chandlery.machine.temporary_folder import TemporaryFolder

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


def test_a_parent_that_can_not_be_made_says_what_to_do() -> None:
    with pytest.raises(
        StorageError, match=r"let the user that runs chandlery write there, or choose another"
    ):
        TemporaryFolder(Path("/sys/chandlery/tmp"))
