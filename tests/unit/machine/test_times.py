from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.machine.times import SharedTimes, TimesInMemory

changes = st.lists(st.tuples(st.text(max_size=3), st.floats(0, 1e9)), max_size=100)


def test_of_more_names_than_there_is_room_for_those_that_were_asked_for_last_stay() -> None:
    times = TimesInMemory(3)
    for name in ("a", "b", "c"):
        times.change(name, lambda _: 1.0)
    times.get("a")
    times.change("d", lambda _: 1.0)
    assert len(times) == 3
    assert [times.get(name) for name in ("a", "b", "c", "d")] == [1.0, 0.0, 1.0, 1.0]


@given(changes)
def test_a_file_has_what_memory_would_have(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, float]]
) -> None:
    alone, shared = TimesInMemory(1000), SharedTimes(tmp_path_factory.mktemp("shared") / "times")
    for name, moment in changes:

        def later(before: float, moment: float = moment) -> float:
            return max(before, moment)

        assert shared.change(name, later) == alone.change(name, later)
    assert all(shared.get(name) == alone.get(name) for name, _ in changes)


def test_a_file_is_read_again_and_told_to_nobody_else(tmp_path: Path) -> None:
    file = tmp_path / "times"
    SharedTimes(file).change("alice", lambda _: 5.0)
    assert SharedTimes(file).get("alice") == 5.0
    assert SharedTimes(file).get("bob") == 0.0
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"alice" not in file.read_bytes()


def test_the_whole_file_has_its_place_on_the_disk(tmp_path: Path) -> None:
    # A write to a hole in a mapped file would be SIGBUS when the disk is full.
    SharedTimes(tmp_path / "times")
    status = (tmp_path / "times").stat()
    assert status.st_blocks * 512 >= status.st_size > 0


def test_of_more_names_than_a_file_has_room_for_the_latest_stay(tmp_path: Path) -> None:
    times = SharedTimes(tmp_path / "times")
    times.change("late", lambda _: 1e6)
    for number in range(30_000):
        times.change(f"name {number}", lambda _: 1e3)
    assert times.get("late") == 1e6
