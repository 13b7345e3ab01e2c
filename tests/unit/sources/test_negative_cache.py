import pytest

from chandlery.errors import ChandleryError
from chandlery.sources.negative_cache import NegativeCache


class Tried:
    """Something that fails until it is told otherwise."""

    def __init__(self, cache: NegativeCache) -> None:
        self.fails = True
        self.times = 0
        self._cache = cache

    def __call__(self, what: str = "this") -> None:
        with self._cache.trying(what):
            self.times += 1
            if self.fails:
                raise ChandleryError(f"failure {self.times} of {what}")


def test_a_failure_is_told_again_for_a_while_and_then_it_is_tried_again() -> None:
    now = 0.0
    attempt = Tried(NegativeCache(30, clock=lambda: now))
    for moment, failure in ((0.0, 1), (29.0, 1), (30.0, 2), (59.0, 2), (61.0, 3)):
        now = moment
        with pytest.raises(ChandleryError, match=f"failure {failure} of this"):
            attempt()
    now = 100.0
    attempt.fails = False
    attempt()
    attempt.fails = True
    with pytest.raises(ChandleryError, match="failure 5 of this"):
        attempt()


def test_one_failure_says_nothing_of_others_and_old_ones_are_forgotten() -> None:
    attempt = Tried(NegativeCache(30, clock=lambda: 0.0))
    for number in range(1025):
        with pytest.raises(ChandleryError):
            attempt(f"number {number}")
    assert attempt.times == 1025
    with pytest.raises(ChandleryError):
        attempt("number 1024")
    assert attempt.times == 1025
    with pytest.raises(ChandleryError):
        attempt("number 0")
    assert attempt.times == 1026


def test_a_clock_that_is_set_back_makes_no_failure_last() -> None:
    now = 1000.0
    attempt = Tried(NegativeCache(30, clock=lambda: now))
    for moment in (1000.0, 1.0):
        now = moment
        with pytest.raises(ChandleryError):
            attempt()
    assert attempt.times == 2
