from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.machine.token_buckets import SharedTokenBuckets, TokenBuckets
from tests.support.clock import Clock


@given(st.integers(1, 500), st.floats(0.1, 10_000))
def test_a_full_bucket_has_as_many_tokens_as_the_limit(limit: int, period: float) -> None:
    buckets = TokenBuckets(period, clock=Clock(1000.0))
    assert [buckets.take("alice", limit) for _ in range(limit)] == [0.0] * limit
    assert buckets.take("alice", limit) == pytest.approx(period / limit)


@given(st.integers(1, 50), st.lists(st.floats(0, 30), min_size=1, max_size=300))
def test_no_more_than_twice_the_limit_is_taken_in_any_period(limit: int, pauses: list[float]) -> None:
    clock = Clock(1000.0)
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
    clock = Clock(1000.0)
    buckets = TokenBuckets(60.0, clock=clock)
    while not (wait := buckets.take("alice", limit)):
        pass
    clock.now += wait
    assert not buckets.take("alice", limit)
    assert buckets.take("alice", limit)


def test_clients_have_a_bucket_each() -> None:
    buckets = TokenBuckets(60.0, clock=Clock(1000.0))
    assert not buckets.take("alice", 1)
    assert buckets.take("alice", 1)
    assert not buckets.take("bob", 1)


def test_only_the_clients_that_came_last_are_remembered() -> None:
    buckets = TokenBuckets(60.0, most_clients=3, clock=Clock(1000.0))
    for client in ("a", "b", "c", "a", "d"):
        buckets.take(client, 2)
    assert buckets.take("a", 2)
    assert not buckets.take("b", 1)


def test_a_token_that_is_given_back_is_there_again() -> None:
    buckets = TokenBuckets(60.0, clock=Clock(1000.0))
    for _ in range(10):
        assert not buckets.take("alice", 1)
        buckets.give_back("alice", 1)
    buckets.give_back("bob", 1)
    assert not buckets.take("bob", 1)
    assert buckets.take("bob", 1)


def test_who_only_asks_takes_nothing() -> None:
    clock = Clock(1000.0)
    buckets = TokenBuckets(60.0, clock=clock)
    assert [buckets.wait("alice", 2) for _ in range(5)] == [0.0] * 5
    assert not buckets.take("alice", 2)
    assert not buckets.take("alice", 2)
    clock.now += 10.0
    assert buckets.wait("alice", 2) == pytest.approx(20.0)


# Shared by processes


def test_processes_take_from_one_bucket(tmp_path: Path) -> None:
    clock = Clock(1000.0)
    first, second = (SharedTokenBuckets(tmp_path / "buckets", 60.0, clock=clock) for _ in range(2))
    taken = [each.take("alice", 4) for _ in range(2) for each in (first, second)]
    assert taken == [0.0] * 4
    assert first.take("alice", 4) == second.take("alice", 4) == pytest.approx(15.0)
    assert not first.take("bob", 4)
    clock.now += 15.0
    assert not second.take("alice", 4)
    assert first.take("alice", 4)


@given(st.lists(st.tuples(st.text(max_size=3), st.floats(0, 30)), max_size=100), st.integers(1, 5))
def test_a_shared_bucket_is_like_any_other(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[str, float]], limit: int
) -> None:
    clock = Clock(1000.0)
    file = tmp_path_factory.mktemp("shared") / "buckets"
    alone, shared = TokenBuckets(60.0, clock=clock), SharedTokenBuckets(file, 60.0, clock=clock)
    for client, pause in requests:
        clock.now += pause
        assert shared.take(client, limit) == pytest.approx(alone.take(client, limit))


def test_more_clients_than_there_is_room_for_lose_the_fullest_buckets(tmp_path: Path) -> None:
    buckets = SharedTokenBuckets(tmp_path / "buckets", 60.0, clock=Clock(1000.0))
    for _ in range(10):
        buckets.take("greedy", 10)
    for number in range(30_000):
        buckets.take(f"client {number}", 10)
    assert buckets.take("greedy", 10)
