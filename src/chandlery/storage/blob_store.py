"""Blobs by digest: what is there is whole.

A blob is written aside, synced, renamed to its place, and the folder is synced; so a blob is either not there
or has all its bytes, whenever the machine stops. Blobs never change, hence putting one twice is harmless.

    <root>/blobs/sha256/<first two digits>/<64 digits>
    <root>/tmp/                                            see `machine.data_folder`
"""

import asyncio
import hashlib
import os
from base64 import b64encode
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from anyio import open_file

from chandlery.errors import BlobNotFoundError
from chandlery.machine.data_folder import TemporaryFolder, storage_errors
from chandlery.oci.digest import Digest
from chandlery.oci.documents import Descriptor
from chandlery.storage.byte_range import ByteRange

_READ_SIZE = 1 << 20
_FOLDERS = tuple(f"{number:02x}" for number in range(256))


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What a store knows about a blob: its size in bytes, when it was written (seconds since the epoch)."""

    size: int
    written_at: float = field(default=0.0, compare=False)


class BlobSource(Protocol):
    """Blobs to read; all methods raise `StorageError`."""

    async def stat(self, digest: Digest) -> BlobInfo | None:
        """Tell whether the blob is there."""
        ...

    def path(self, digest: Digest) -> Path | None:
        """Give the file that holds the blob or would hold it; None from a store without files."""
        ...

    async def url(self, digest: Digest, lifetime: float) -> str | None:
        """Give where clients get the blob themselves, for `lifetime` seconds; None if they get it here."""
        ...

    def read(self, digest: Digest, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        """Give the blob, or a range of it that lies within; `BlobNotFoundError` at the first step."""
        ...


class BlobStore(BlobSource, Protocol):
    """Blobs by digest; a blob that `stat` knows is whole.

    `tests/support/blob_store_contract.py` says what every store keeps. All methods raise `StorageError`.
    """

    @property
    def on_this_disk(self) -> bool:
        """Whether blobs take room on this machine, and are this data folder's alone.

        Otherwise other servers share them, and the store sees to it that they last.
        """
        ...

    async def check(self) -> None:
        """Raise `StorageError` unless blobs can be written, read and deleted."""
        ...

    def location(self, digest: Digest) -> str:
        """Say where the blob is: a path, or the address of an object, which isn't secret."""
        ...

    def temporary_file(self) -> AbstractContextManager[Path]:
        """Give a path to write a blob at before `put`; a full disk becomes `StorageFullError`."""
        ...

    async def put(self, digest: Digest, file: Path, media_type: str) -> None:
        """Take a finished `temporary_file` over: it is gone, and the blob durable, when this returns.

        The caller has hashed the file; it isn't read again.
        """
        ...

    async def put_bytes(self, content: bytes, media_type: str) -> Descriptor:
        """Put something small, such as a manifest."""
        ...

    async def delete(self, digest: Digest) -> None:
        """Remove the blob; it's no error when it isn't there."""
        ...

    def digests(self) -> AsyncIterator[Digest]:
        """Give the digest of every blob, in order; those put or deleted meanwhile may be missed."""
        ...

    async def inventory(self) -> Mapping[Digest, BlobInfo]:
        """Give what is known of every blob; those put or deleted meanwhile may be missed."""
        ...

    async def sweep(self) -> None:
        """Remove the temporary files of processes that died since this store was opened."""
        ...


class FileBlobStore:
    """The store on a file system; opening it makes its folders and removes what dead processes left.

    `root` can be shared with other processes that are alive. Raises `StorageError` when it can't be written.
    """

    on_this_disk = True

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs" / "sha256"
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
        return self._blobs / digest.hex[:2] / digest.hex

    def location(self, digest: Digest) -> str:
        """See `BlobStore`."""
        return str(self.path(digest))

    async def url(self, digest: Digest, lifetime: float) -> None:
        """See `BlobSource`: this server is the only one that has the files."""
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


async def is_intact(blobs: BlobStore, digest: Digest, bytes_per_second: float = float("inf")) -> bool:
    """Read a blob, as fast as it may be, and tell whether it has its digest.

    One that can't be read to its end has not. Raises `BlobNotFoundError`.
    """
    state = hashlib.sha256()
    try:
        async for block in blobs.read(digest):
            await asyncio.to_thread(state.update, block)
            if bytes_per_second < float("inf"):
                await asyncio.sleep(len(block) / bytes_per_second)
    except OSError:
        return False
    return state.hexdigest() == digest.hex


async def content_of(blobs: BlobSource, digest: Digest) -> bytes:
    """Give all of a blob that is small; see `BlobSource.read`."""
    return b"".join([block async for block in blobs.read(digest)])


async def content_md5(blobs: BlobSource, digest: Digest) -> str:
    """Read a blob for its MD5 in base64, as in Content-MD5 (RFC 1864); see `BlobSource.read`."""
    state = hashlib.md5(usedforsecurity=False)
    async for block in blobs.read(digest):
        await asyncio.to_thread(state.update, block)
    return b64encode(state.digest()).decode()


@asynccontextmanager
async def local_files(blobs: BlobStore, digests: Iterable[Digest]) -> AsyncIterator[Mapping[Digest, Path]]:
    """Give a file with each blob, fetched for the time being if the store has none; see `BlobSource.read`."""
    with ExitStack() as stack:
        files = {}
        for digest in digests:
            path = blobs.path(digest)
            if path is None:
                path = stack.enter_context(blobs.temporary_file())
                async with await open_file(path, "wb") as file:
                    async for block in blobs.read(digest):
                        await file.write(block)
            files[digest] = path
        yield files


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
