from pathlib import Path

from chandlery.maintenance.run_marker import RunMarker


def test_after_a_clean_end_nothing_is_in_doubt(tmp_path: Path) -> None:
    for _ in range(2):
        marker = RunMarker(tmp_path)
        assert marker.begin() is None
        marker.end()


def test_a_server_that_takes_over_from_one_that_still_runs_follows_no_crash(tmp_path: Path) -> None:
    first, second, third = (RunMarker(tmp_path) for _ in range(3))
    assert first.begin() is None
    assert second.begin() is None
    first.end()
    assert (tmp_path / "running").exists()
    second.end()
    assert third.begin() is None
    third.end()
