from pathlib import Path

import pytest

from chandlery.errors import StorageError
from chandlery.machine.temporary_folder import TemporaryFolder


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


def test_a_parent_that_can_not_be_made_says_what_to_do() -> None:
    with pytest.raises(
        StorageError, match=r"let the user that runs chandlery write there, or choose another"
    ):
        TemporaryFolder(Path("/sys/chandlery/tmp"))
