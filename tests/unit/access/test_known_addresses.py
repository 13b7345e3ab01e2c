import errno
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from chandlery.access.known_addresses import KnownAddresses
from chandlery.machine.times import SharedTimes, TimesInMemory
from tests.support.clock import Clock

DAY = 86400.0


def test_a_user_is_known_where_it_has_logged_in_and_nowhere_else() -> None:
    known = KnownAddresses(clock=Clock())
    assert not known.knows("alice", "192.0.2.7")
    known.note("alice", "192.0.2.7")
    assert known.knows("alice", "192.0.2.7")
    assert not known.knows("alice", "192.0.2.8")
    assert not known.knows("bob", "192.0.2.7")


def test_it_is_known_for_90_days_after_the_last_time() -> None:
    clock = Clock()
    known = KnownAddresses(clock=clock)
    for _ in range(5):
        known.note("alice", "192.0.2.7")
        clock.now += 60 * DAY
        assert known.knows("alice", "192.0.2.7")
    clock.now += 31 * DAY
    assert not known.knows("alice", "192.0.2.7")


def test_a_clock_that_was_ahead_once_makes_nobody_known_for_ever() -> None:
    clock, times = Clock(2_000_000_000.0), TimesInMemory(10)
    KnownAddresses(times, clock=clock).note("alice", "192.0.2.7")
    clock.now = 1_700_000_000.0
    known = KnownAddresses(times, clock=clock)
    known.note("alice", "192.0.2.7")
    clock.now += 91 * DAY
    assert not known.knows("alice", "192.0.2.7")


def test_it_outlives_the_server_and_is_shared_by_its_workers(tmp_path: Path) -> None:
    first, second = (KnownAddresses.in_file(tmp_path / "known") for _ in range(2))
    first.note("alice", "192.0.2.7")
    assert second.knows("alice", "192.0.2.7")
    assert KnownAddresses.in_file(tmp_path / "known").knows("alice", "192.0.2.7")


def test_without_room_for_the_file_a_server_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: SharedTimes, file: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(SharedTimes, "__init__", full)
    with capture_logs() as events:
        known = KnownAddresses.in_file(tmp_path / "known")
    known.note("alice", "192.0.2.7")
    assert known.knows("alice", "192.0.2.7")
    assert [event["log_level"] for event in events] == ["warning"]
    assert "No space left" in events[0]["reason"]
