from pathlib import Path

from chandlery.builds.wanted_collection import WantedCollection


def test_what_one_process_wants_another_takes_once(tmp_path: Path) -> None:
    here, there = WantedCollection(tmp_path), WantedCollection(tmp_path)
    assert not there.is_wanted
    assert not there.take()
    here.want()
    here.want()
    assert there.is_wanted
    assert there.take()
    assert not here.take()


def test_a_wish_that_can_not_be_written_is_no_error(tmp_path: Path) -> None:
    wanted = WantedCollection(tmp_path / "gone")
    wanted.want()
    assert not wanted.take()
