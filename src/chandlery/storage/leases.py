"""Blobs that builds and readers count on, so that no collector takes them.

    leases/<pid>-<random>/lock                 held by a process as long as it lives (see `TemporaryFolder`)
    leases/<pid>-<random>/<random>/<64 digits> an empty file for each blob that a lease is for

Two rules make collecting safe while several processes build and serve:

- Who counts on a blob takes a lease of it before looking whether it is there, or before putting it there, and
  gives the lease back when the blob isn't needed, or when the build index has an image that needs it.
- Who deletes blobs holds the lock of `leases/` meanwhile, and asks first which blobs have a lease, and after
  that which ones the index needs. No lease can be taken under the lock, so a blob that is neither leased nor
  needed stays so until it is deleted.

A build that reuses a layer thus sees it missing and packs it again, or sees it and keeps it.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_hex
from typing import Self

from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.locks import holding
from chandlery.machine.temporary_folder import TemporaryFolder
from chandlery.oci.digest import Digest


class Leases:
    """The leases of all processes that share the data folder `folder`, and this one's to give out."""

    def __init__(self, folder: Path) -> None:
        self._parent = folder / "leases"
        self._own = TemporaryFolder(self._parent)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def lease(self) -> AsyncIterator["Lease"]:
        """Return a new lease, which ends with the body."""
        folder = self._own.path / token_hex(8)
        with storage_errors(folder):
            folder.mkdir()
        try:
            yield Lease(self, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Keep every process from taking leases, for a moment; whoever waits here has turns in order."""
        async with self._turn, holding(self._parent):
            yield

    def leased(self) -> set[Digest]:
        """Return every blob that has a lease; of processes that died too, until `sweep`."""
        leases = (lease for process in _listed(self._parent) for lease in _listed(process))
        return {Digest(file.name) for lease in leases for file in _listed(lease)}

    async def sweep(self) -> None:
        """Remove the leases of processes that died."""
        await asyncio.to_thread(self._own.sweep)

    def close(self) -> None:
        """End all leases of this process."""
        self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lease:
    """The blobs that one build or one reader counts on."""

    def __init__(self, leases: Leases, folder: Path) -> None:
        self._leases = leases
        self._folder = folder

    async def take(self, *digests: Digest) -> None:
        """Keep blobs from being collected from now on, whether they are there yet or not."""
        async with self._leases.locked():
            with storage_errors(self._folder):
                for digest in digests:
                    (self._folder / digest.hex).touch()

    def give_back(self, digest: Digest) -> None:
        """Count on a blob no longer."""
        (self._folder / digest.hex).unlink(missing_ok=True)


def _listed(folder: Path) -> list[Path]:
    """Return what is in a folder: nothing, if it is none, or its lease ended a moment ago."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
