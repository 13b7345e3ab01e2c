import os
from pathlib import Path

from chandlery.builds.tickets import Tickets
from tests.support.clock import Clock


def three(folder: Path, clock: Clock) -> tuple[Tickets, Tickets, Tickets]:
    return Tickets(folder, clock), Tickets(folder, clock), Tickets(folder, clock)


def test_who_has_waited_longest_is_first(tmp_path: Path) -> None:
    clock = Clock()
    a, b, c = three(tmp_path, clock)
    assert a.is_first()
    a.keep()
    clock.now += 0.1
    b.keep()
    clock.now += 0.1
    a.keep()
    assert [each.is_first() for each in (a, b, c)] == [True, False, False]
    a.give_back()
    clock.now += 0.1
    a.keep()
    assert [each.is_first() for each in (a, b, c)] == [False, True, False]
    b.give_back()
    a.give_back()
    assert c.is_first()
    assert not list(tmp_path.iterdir())


def test_who_looks_no_more_keeps_nobody_waiting_and_begins_anew(tmp_path: Path) -> None:
    clock = Clock()
    a, b, _ = three(tmp_path, clock)
    a.keep()
    clock.now += 0.4
    b.keep()
    assert not b.is_first()
    clock.now += 0.4
    assert b.is_first()
    a.keep()
    assert not a.is_first()


def test_what_can_not_be_read_or_written_keeps_nobody_waiting(tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "other.ticket").write_text("no ticket")
    a = Tickets(tmp_path, clock)
    assert a.is_first()
    gone = Tickets(tmp_path / "gone", clock)
    gone.keep()
    assert gone.is_first()
    gone.give_back()


def test_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    a, b, _ = three(tmp_path, Clock())
    a.keep()
    [left] = tmp_path.iterdir()
    os.utime(left, (1, 1))
    b.keep()
    b.sweep()
    assert left not in tmp_path.iterdir()
    assert len(list(tmp_path.iterdir())) == 1
