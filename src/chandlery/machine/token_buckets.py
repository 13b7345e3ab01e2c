"""How often a client may do something: a token bucket for each, which costs two numbers and no timer.

A bucket holds as many tokens as may be used in a period, and fills evenly. All that is kept of it is when it
will be full (the generic cell rate algorithm, ITU-T I.371): a client that isn't known has a full one, so
the clients that did nothing for longest can be forgotten. Several processes can share buckets in a file.
"""

import mmap
import os
import struct
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from cachetools import LRUCache

from chandlery.machine.locks import lock, unlock

_MOST_CLIENTS = 10_000

# The file of shared buckets: rows of places; a place has a client's hash, and when its bucket will be full.
_ROWS, _PLACES = 2048, 8
_PLACE = struct.Struct("=Qd")
_ROW_SIZE = _PLACES * _PLACE.size


class Buckets(Protocol):
    """A bucket for each client."""

    def take(self, client: str, limit: int) -> float:
        """Take one of a client's `limit` tokens: 0.0 if there was one, else in how many seconds there is."""


class TokenBuckets:
    """Buckets by client that fill in `period` seconds; at most `most_clients` are remembered."""

    def __init__(
        self,
        period: float,
        *,
        most_clients: int = _MOST_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._period = period
        self._clock = clock
        self._full_at: LRUCache[str, float] = LRUCache(most_clients)

    def take(self, client: str, limit: int) -> float:
        """See `Buckets`."""
        wait, full_at = _take(self._full_at.get(client, 0.0), self._clock(), self._period, limit)
        if not wait:
            self._full_at[client] = full_at
        return wait


class SharedTokenBuckets:
    """Buckets that several processes take from, in a file; where there is no room the fullest is forgotten.

    The clock has to be the same for all of them, as the system's monotonic one is.
    """

    def __init__(self, file: Path, period: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._period = period
        self._clock = clock
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, _ROWS * _ROW_SIZE)
        self._table = mmap.mmap(self._file, _ROWS * _ROW_SIZE)

    def take(self, client: str, limit: int) -> float:
        """See `Buckets`; others are kept waiting for microseconds."""
        # 0 is a place that nobody has.
        key = int.from_bytes(blake2b(client.encode(errors="surrogatepass"), digest_size=8).digest()) or 1
        row = key % _ROWS * _ROW_SIZE
        lock(self._file)
        try:
            places = list(_PLACE.iter_unpack(self._table[row : row + _ROW_SIZE]))
            mine = [number for number, (owner, _) in enumerate(places) if owner == key]
            place = mine[0] if mine else min(range(_PLACES), key=lambda number: places[number][1])
            known = places[place][1] if mine else 0.0
            wait, full_at = _take(known, self._clock(), self._period, limit)
            if not wait:
                _PLACE.pack_into(self._table, row + place * _PLACE.size, key, full_at)
        finally:
            unlock(self._file)
        return wait


def _take(full_at: float, now: float, period: float, limit: int) -> tuple[float, float]:
    """Take a token: give how long to wait for one, 0.0 if there was one, and when the bucket is full then."""
    full_at = max(full_at, now) + period / limit
    wait = full_at - now - period
    # A sum of fractions may be a little more than the whole.
    return (wait if wait > period * 1e-6 else 0.0), full_at
