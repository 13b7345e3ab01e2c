"""A moment for each of many names, such as when a client's bucket is full: as many as there is room for.

Where there is no room, the earliest are forgotten. Several processes can have them in one file, which each
maps into memory; it has hashes of the names alone.
"""

import mmap
import os
import struct
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from cachetools import LRUCache

from chandlery.machine.locks import lock, unlock

# The file: rows of places; a place has the hash of a name, and its moment.
_ROWS, _PLACES = 2048, 8
_PLACE = struct.Struct("=Qd")
_ROW_SIZE = _PLACES * _PLACE.size


class Times(Protocol):
    """A moment for each name, in seconds of any clock that begins at 0."""

    def get(self, name: str) -> float:
        """Return the moment of a name, 0.0 if none is known."""

    def change(self, name: str, new: Callable[[float], float]) -> float:
        """Give a name the moment that `new` returns of the one that it has; return the one that it had."""


class TimesInMemory:
    """The moments of one process; of more than `most` names, those that were asked for last stay."""

    def __init__(self, most: int) -> None:
        self._times: LRUCache[bytes, float] = LRUCache(most)

    def __len__(self) -> int:
        """Return how many moments are known."""
        return len(self._times)

    def get(self, name: str) -> float:
        """See `Times`."""
        return self._times.get(_hash(name), 0.0)

    def change(self, name: str, new: Callable[[float], float]) -> float:
        """See `Times`."""
        before = self.get(name)
        after = new(before)
        if after != before:
            self._times[_hash(name)] = after
        return before


class SharedTimes:
    """The moments of several processes, in a file; other processes are kept waiting for microseconds."""

    def __init__(self, file: Path) -> None:
        size = _ROWS * _ROW_SIZE
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # All of it is there from now on: on a full disk, writing to the map would kill the process.
            os.posix_fallocate(self._file, 0, size)
            self._table = mmap.mmap(self._file, size)
        except OSError:
            os.close(self._file)
            raise

    def get(self, name: str) -> float:
        """See `Times`."""
        return self.change(name, lambda moment: moment)

    def change(self, name: str, new: Callable[[float], float]) -> float:
        """See `Times`."""
        # 0 is a place that nobody has.
        key = int.from_bytes(_hash(name)) or 1
        row = key % _ROWS * _ROW_SIZE
        lock(self._file)
        try:
            places = list(_PLACE.iter_unpack(self._table[row : row + _ROW_SIZE]))
            mine = [number for number, (owner, _) in enumerate(places) if owner == key]
            place = mine[0] if mine else min(range(_PLACES), key=lambda number: places[number][1])
            before = places[place][1] if mine else 0.0
            after = new(before)
            if after != before:
                _PLACE.pack_into(self._table, row + place * _PLACE.size, key, after)
        finally:
            unlock(self._file)
        return before


def _hash(name: str) -> bytes:
    return blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
