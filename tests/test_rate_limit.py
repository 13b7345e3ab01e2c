import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.rate_limit import TokenBuckets


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 500), st.floats(0.1, 10_000))
def test_a_full_bucket_has_as_many_tokens_as_the_limit(limit: int, period: float) -> None:
    buckets = TokenBuckets(period, clock=Clock())
    assert [buckets.take("alice", limit) for _ in range(limit)] == [0.0] * limit
    assert buckets.take("alice", limit) == pytest.approx(period / limit)


@given(st.integers(1, 50), st.lists(st.floats(0, 30), min_size=1, max_size=300))
def test_no_more_than_twice_the_limit_is_taken_in_any_period(limit: int, pauses: list[float]) -> None:
    clock = Clock()
    buckets = TokenBuckets(60.0, clock=clock)
    taken = []
    for pause in pauses:
        clock.now += pause
        if not buckets.take("alice", limit):
            taken.append(clock.now)
    # What was full at first, and what came in meanwhile.
    for start in taken:
        assert sum(start <= at < start + 60.0 for at in taken) <= 2 * limit


@given(st.integers(1, 100))
def test_who_waits_as_long_as_told_gets_a_token(limit: int) -> None:
    clock = Clock()
    buckets = TokenBuckets(60.0, clock=clock)
    while not (wait := buckets.take("alice", limit)):
        pass
    clock.now += wait
    assert not buckets.take("alice", limit)
    assert buckets.take("alice", limit)


def test_clients_have_a_bucket_each() -> None:
    buckets = TokenBuckets(60.0, clock=Clock())
    assert not buckets.take("alice", 1)
    assert buckets.take("alice", 1)
    assert not buckets.take("bob", 1)


def test_only_the_clients_that_came_last_are_remembered() -> None:
    buckets = TokenBuckets(60.0, most_clients=3, clock=Clock())
    for client in ("a", "b", "c", "a", "d"):
        buckets.take(client, 2)
    assert len(buckets._full_at) == 3
    assert buckets.take("a", 2)
    assert not buckets.take("b", 1)
