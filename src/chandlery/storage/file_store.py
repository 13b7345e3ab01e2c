"""Blobs as files, by digest: what is there is whole.

A blob is written aside, synced, renamed to its place, and the folder is synced; so a blob is either not there
or has all its bytes, whenever the machine stops.

    <root>/blobs/sha256/<first two digits>/<64 digits>
    <root>/tmp/                                            see `machine.temporary_folder`
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Self

from anyio import open_file

from chandlery.errors import BlobNotFoundError
from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.temporary_folder import TemporaryFolder
from chandlery.oci.digest import Digest
from chandlery.oci.documents import Descriptor
from chandlery.storage.blob_store import BlobInfo
from chandlery.storage.byte_range import ByteRange

_READ_SIZE = 1 << 20
_FOLDERS = tuple(f"{number:02x}" for number in range(256))


class FileBlobStore:
    """The store on a file system; opening it makes its folders and removes what dead processes left.

    `root` can be shared with other processes that are alive. Raises `StorageError` when it can't be written.
    """

    on_this_disk = True

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs" / "sha256"
        self._location = str(self._blobs)
        with storage_errors(root):
            self._blobs.mkdir(parents=True, exist_ok=True)
            for name in _FOLDERS:
                (self._blobs / name).mkdir(exist_ok=True)
            for folder in (self._blobs, self._blobs.parent, root):
                _sync(folder)
        self._temporary = TemporaryFolder(root / "tmp")

    async def check(self) -> None:
        """See `BlobStore`."""
        await asyncio.to_thread(self._temporary.check)

    def path(self, digest: Digest) -> Path:
        """See `BlobStore`."""
        return Path(self.location(digest))

    def location(self, digest: Digest) -> str:
        """See `BlobStore`."""
        return f"{self._location}/{digest.hex[:2]}/{digest.hex}"

    async def url(self, digest: Digest, lifetime: float) -> None:
        """See `BlobReader`: this server is the only one that has the files."""
        return

    async def stat(self, digest: Digest) -> BlobInfo | None:
        """See `BlobStore`."""
        return await asyncio.to_thread(self._stat, digest)

    async def read(self, digest: Digest, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        """See `BlobStore`."""
        try:
            blob = await open_file(self.path(digest), "rb")
        except FileNotFoundError:
            raise BlobNotFoundError(str(digest)) from None
        async with blob:
            if byte_range is None:
                while block := await blob.read(_READ_SIZE):
                    yield block
                return
            await blob.seek(byte_range.start)
            left = byte_range.size
            while left and (block := await blob.read(min(left, _READ_SIZE))):
                left -= len(block)
                yield block

    def temporary_file(self) -> AbstractContextManager[Path]:
        """See `BlobStore`."""
        return self._temporary.file()

    async def put(self, digest: Digest, file: Path, media_type: str) -> None:
        """See `BlobStore`; files have no media type, so that is forgotten."""
        await asyncio.to_thread(self._put, digest, file)

    async def put_bytes(self, content: bytes, media_type: str) -> Descriptor:
        """See `BlobStore`."""
        digest = Digest.of(content)
        await asyncio.to_thread(self._put_bytes, digest, content)
        return Descriptor(media_type, digest, len(content))

    async def delete(self, digest: Digest) -> None:
        """See `BlobStore`."""
        await asyncio.to_thread(self._delete, digest)

    async def digests(self) -> AsyncIterator[Digest]:
        """See `BlobStore`."""
        for folder in _FOLDERS:
            for name in await asyncio.to_thread(_names, self._blobs / folder):
                yield Digest(name)

    async def inventory(self) -> Mapping[Digest, BlobInfo]:
        """See `BlobStore`."""
        return await asyncio.to_thread(self._inventory)

    async def sweep(self) -> None:
        """See `BlobStore`."""
        await asyncio.to_thread(self._temporary.sweep)

    def close(self) -> None:
        """Remove the temporary files of this process."""
        self._temporary.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stat(self, digest: Digest) -> BlobInfo | None:
        path = self.path(digest)
        with storage_errors(path.parent):
            try:
                return _info(path.stat())
            except FileNotFoundError:
                return None

    def _inventory(self) -> dict[Digest, BlobInfo]:
        found = {}
        for name in _FOLDERS:
            folder = self._blobs / name
            with storage_errors(folder):
                for entry in os.scandir(folder):
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        found[Digest(entry.name)] = _info(entry.stat())
        return found

    def _put(self, digest: Digest, file: Path) -> None:
        target = self.path(digest)
        try:
            with storage_errors(target.parent):
                if not target.exists():
                    _sync(file)
                    file.rename(target)
                # Needed for a blob that was there, too: the process that put it may not have come so far.
                _sync(target.parent)
        finally:
            file.unlink(missing_ok=True)

    def _put_bytes(self, digest: Digest, content: bytes) -> None:
        with self.temporary_file() as file:
            file.write_bytes(content)
            self._put(digest, file)

    def _delete(self, digest: Digest) -> None:
        path = self.path(digest)
        with storage_errors(path.parent):
            path.unlink(missing_ok=True)


def _info(status: os.stat_result) -> BlobInfo:
    return BlobInfo(status.st_size, status.st_mtime)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(folder: Path) -> list[str]:
    with storage_errors(folder):
        return sorted(os.listdir(folder))
