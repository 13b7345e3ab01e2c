import pytest

from chandlery.telemetry.build_timings import Timings, Work, WorkTime


def timings(*spans: tuple[Work, float, float]) -> list[WorkTime]:
    found = Timings(100.0)
    for work, begin, end in spans:
        found.add(work, 100.0 + begin, 100.0 + end)
    return found.times()


def test_works_are_told_in_their_order_whichever_ended_first() -> None:
    times = timings((Work.PACK, 2.0, 3.0), (Work.RESOLVE, 0.0, 1.0))
    assert times == [WorkTime(Work.RESOLVE, 0.0, 1.0, 1.0), WorkTime(Work.PACK, 2.0, 3.0, 1.0)]


@pytest.mark.parametrize(
    ("spans", "busy"),
    [
        ([(0.0, 1.0), (2.0, 4.0)], 3.0),
        ([(0.0, 3.0), (1.0, 2.0), (2.5, 4.0)], 4.0),
        ([(3.0, 4.0), (0.0, 4.0)], 4.0),
        ([(1.0, 1.0), (4.0, 4.0)], 0.0),
    ],
)
def test_what_overlaps_counts_once(spans: list[tuple[float, float]], busy: float) -> None:
    [time] = timings(*((Work.BUILD, begin, end) for begin, end in spans))
    assert time == WorkTime(Work.BUILD, min(spans)[0], 4.0, busy)


def test_a_work_that_fails_has_lasted_until_then() -> None:
    found = Timings()
    with pytest.raises(ValueError, match="it"), found.during(Work.STORE):
        raise ValueError("it")
    assert [time.work for time in found.times()] == [Work.STORE]


def test_where_nothing_was_done_there_is_nothing_to_tell() -> None:
    assert Timings().times() == []
