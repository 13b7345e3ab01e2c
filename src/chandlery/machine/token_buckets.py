"""How often a client may do something: a token bucket for each, which costs two numbers and no timer.

A bucket holds as many tokens as may be used in a period, and fills evenly. All that is kept of it is when it
will be full (the generic cell rate algorithm, ITU-T I.371): a client that isn't known has a full one, so
the clients that did nothing for longest can be forgotten. Several processes can share buckets in a file.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from chandlery.machine.times import SharedTimes, Times, TimesInMemory

_MOST_CLIENTS = 10_000


class Buckets(Protocol):
    """A bucket for each client."""

    def wait(self, client: str, limit: int) -> float:
        """Return in how many seconds one of a client's `limit` tokens is there, 0.0 if there is one."""

    def take(self, client: str, limit: int) -> float:
        """Take one of a client's `limit` tokens: 0.0 if there was one, else in how many seconds there is."""

    def give_back(self, client: str, limit: int) -> None:
        """Give back a token that was taken and not used."""


class _Buckets:
    """Buckets by client that fill in `period` seconds, and are full at a moment of `times`."""

    def __init__(self, times: Times, period: float, clock: Callable[[], float]) -> None:
        self._full_at = times
        self._period = period
        self._clock = clock

    def wait(self, client: str, limit: int) -> float:
        """See `Buckets`."""
        return _take(self._full_at.get(client), self._clock(), self._period, limit)[0]

    def take(self, client: str, limit: int) -> float:
        """See `Buckets`."""
        now = self._clock()

        def taken(full_at: float) -> float:
            wait, then = _take(full_at, now, self._period, limit)
            return full_at if wait else then

        return _take(self._full_at.change(client, taken), now, self._period, limit)[0]

    def give_back(self, client: str, limit: int) -> None:
        """See `Buckets`."""
        self._full_at.change(client, lambda full_at: max(0.0, full_at - self._period / limit))


class TokenBuckets(_Buckets):
    """Buckets of one process; at most `most_clients` are remembered."""

    def __init__(
        self,
        period: float,
        *,
        most_clients: int = _MOST_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(TimesInMemory(most_clients), period, clock)


class SharedTokenBuckets(_Buckets):
    """Buckets that several processes take from, in a file; where there is no room the fullest is forgotten.

    The clock has to be the same for all of them, as the system's monotonic one is.
    """

    def __init__(self, file: Path, period: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(SharedTimes(file), period, clock)


def _take(full_at: float, now: float, period: float, limit: int) -> tuple[float, float]:
    """Take a token: give how long to wait for one, 0.0 if there was one, and when the bucket is full then."""
    full_at = max(full_at, now) + period / limit
    wait = full_at - now - period
    # A sum of fractions may be a little more than the whole.
    return (wait if wait > period * 1e-6 else 0.0), full_at
