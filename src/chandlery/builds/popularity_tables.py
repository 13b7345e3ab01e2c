"""The tables of popularity that images are planned with, each kept by its identity in the data folder.

An image's recipe has the identity alone. So its table is kept here, after the package set has a newer one: an
image whose blobs were lost or collected is made again with the same layers.

    popularity/<identity>.json.zst
    popularity/<hash of an address>.last    the identity of what was there last

"""

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog
import zstandard
from cachetools import LRUCache

from chandlery.machine.download import Address, DownloadFailedError, DownloadLimits, fetch, retried
from chandlery.machine.durable import durably_replace
from chandlery.plan.popularity import Popularity

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# 350 kB each for Debian, whose index changes once or twice a day.
_MOST_KEPT = 256
# 15 MB each in memory: the two platforms of an index, and the two before.
_MOST_READ = 4
# Bytes; that of nixpkgs is 5 MB.
_LARGEST = 256 << 20


class PopularityTables:
    """The tables in `folder`/popularity; all methods can be called from any thread, and may read files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "popularity"
        self._read: LRUCache[str, Popularity] = LRUCache(_MOST_READ)
        self._identities: dict[Path, str] = {}
        self._lock = threading.Lock()

    def keep(self, table: Popularity) -> str:
        """Keep a table, as far as the disk allows; give its identity."""
        with self._lock:
            self._keep(table)
        return table.identity

    def keep_file(self, file: Path) -> str:
        """Likewise, of a file that never changes. Raises `ValueError` and `OSError` if it has no table."""
        with self._lock:
            if file not in self._identities:
                table = Popularity.parse(file.read_bytes())
                self._keep(table)
                self._identities[file] = table.identity
            return self._identities[file]

    async def fetch(self, address: Address) -> Popularity:
        """Return the table that is at an address now, or else the one that was there last.

        Raises `DownloadFailedError`, and `ValueError` if what is there is no table and there never was one. A
        file is the operator's own, and is told to be wrong.
        """
        # Beside it, as two addresses may have the same table.
        last = self._folder / f"{hashlib.sha256(str(address).encode()).hexdigest()[:16]}.last"
        limits = DownloadLimits(total=120.0, pauses=(1.0,))
        try:
            content = await retried(lambda: fetch(address, _read, limits), limits.pauses)
            table = await asyncio.to_thread(Popularity.parse, content)
        except (DownloadFailedError, ValueError) as error:
            if address.file and isinstance(error, ValueError):
                raise
            try:
                table = await asyncio.to_thread(lambda: self.table(last.read_text()))
            except (OSError, KeyError):
                raise error from None
            log.warning("the last table of popularity is used", reason=str(error), identity=table.identity)
            return table

        def remember() -> None:
            self.keep(table)
            with suppress(OSError):
                durably_replace(last, table.identity.encode())

        await asyncio.to_thread(remember)
        return table

    def table(self, identity: str) -> Popularity:
        """Return the table that has this identity (none has the empty one); `KeyError` if it isn't kept."""
        if not identity:
            return Popularity()
        with self._lock:
            found = self._read.get(identity) or self._kept(identity)
            self._read[identity] = found
        return found

    def _keep(self, table: Popularity) -> None:
        self._read[table.identity] = table
        path = self._path(table.identity)
        try:
            if path.exists():
                path.touch()
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            durably_replace(path, zstandard.compress(table.encode()))
            self._trim()
        except OSError as error:
            # It is in memory, and a pull that needs nothing new doesn't fail because of it.
            log.warning("a table of popularity can't be kept", file=str(path), error=str(error))

    def _kept(self, identity: str) -> Popularity:
        path = self._path(identity)
        try:
            table = Popularity.parse(zstandard.decompress(path.read_bytes()))
            path.touch()
        except (OSError, ValueError, zstandard.ZstdError) as error:
            raise KeyError(identity) from error
        if table.identity != identity:
            log.warning("a table of popularity is damaged", file=str(path))
            raise KeyError(identity)
        return table

    def _trim(self) -> None:
        """Remove those that were used the longest ago."""
        tables = sorted(self._folder.glob("*.json.zst"), key=os.path.getmtime)
        for old in tables[:-_MOST_KEPT]:
            with suppress(OSError):
                old.unlink()

    def _path(self, identity: str) -> Path:
        return self._folder / f"{identity}.json.zst"


def _read(read: Callable[[], bytes]) -> bytes:
    content = bytearray()
    while piece := read():
        content += piece
        if len(content) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST >> 20} MiB, and no table has")
    return bytes(content)
