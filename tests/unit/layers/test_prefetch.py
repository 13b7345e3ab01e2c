import threading
from collections.abc import Iterator
from itertools import count, islice

import pytest

from chandlery.layers.prefetch import ahead


def test_everything_comes_in_order_from_another_thread() -> None:
    threads = set()

    def numbers() -> Iterator[int]:
        threads.add(threading.get_ident())
        yield from range(100)

    with ahead(numbers(), 3) as items:
        assert list(items) == list(range(100))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_what_is_raised_comes_after_what_came_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with ahead(failing(), 3) as items:
        assert next(items) == 1
        with pytest.raises(KeyboardInterrupt):
            next(items)


def test_no_more_is_made_than_may_wait() -> None:
    made = []
    waiting = threading.Event()

    def numbers() -> Iterator[int]:
        for number in count():
            made.append(number)
            # One is in hand while the queue is full.
            if number == 3:
                waiting.set()
            yield number

    with ahead(numbers(), 3) as items:
        assert waiting.wait(10)
        assert len(made) == 4
        assert list(islice(items, 10)) == list(range(10))


def test_whoever_leaves_early_leaves_no_thread() -> None:
    before = threading.active_count()
    with ahead(count(), 3) as first, ahead(first, 3) as second:
        assert next(second) == 0
    assert threading.active_count() == before


def test_an_error_in_the_last_stage_ends_the_others() -> None:
    before = threading.active_count()
    with pytest.raises(OSError, match="full"), ahead(count(), 3) as first, ahead(first, 3):
        raise OSError("full")
    assert threading.active_count() == before
