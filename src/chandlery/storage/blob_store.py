"""Blobs by digest: what a store of them is, whatever keeps them; and what is done with any store.

What is there is whole. Blobs never change, hence putting one twice is harmless.
"""

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from anyio import open_file

from chandlery.oci.digest import Digest
from chandlery.oci.documents import Descriptor
from chandlery.storage.byte_range import ByteRange


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What a store knows about a blob: its size in bytes, when it was written (seconds since the epoch)."""

    size: int
    written_at: float = field(default=0.0, compare=False)


class BlobReader(Protocol):
    """Blobs to read; all methods raise `StorageError`."""

    def path(self, digest: Digest) -> Path | None:
        """Return the file that holds the blob or would hold it; None from a store without files."""
        ...

    async def url(self, digest: Digest, lifetime: float) -> str | None:
        """Return where clients get the blob themselves, for `lifetime` seconds; None if they get it here."""
        ...

    def read(self, digest: Digest, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        """Return the blob, or a range of it that lies within; `BlobNotFoundError` at the first step."""
        ...


class BlobStore(BlobReader, Protocol):
    """Blobs by digest; a blob that `stat` knows is whole.

    `tests/support/blob_store_contract.py` says what every store keeps. All methods raise `StorageError`.
    """

    @property
    def on_this_disk(self) -> bool:
        """Whether blobs take room on this machine, and are this data folder's alone.

        Otherwise other servers share them, and the store sees to it that they last.
        """
        ...

    async def stat(self, digest: Digest) -> BlobInfo | None:
        """Return what is known of a blob; None if it isn't there."""
        ...

    async def check(self) -> None:
        """Raise `StorageError` unless blobs can be written, read and deleted."""
        ...

    def location(self, digest: Digest) -> str:
        """Say where the blob is: a path if blobs are `on_this_disk`, or an object's address; no secret."""
        ...

    def temporary_file(self) -> AbstractContextManager[Path]:
        """Return a path to write a blob at before `put`; a full disk becomes `StorageFullError`."""
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
        """Return the digest of every blob, in order; those put or deleted meanwhile may be missed."""
        ...

    async def inventory(self) -> Mapping[Digest, BlobInfo]:
        """Return what is known of every blob; those put or deleted meanwhile may be missed."""
        ...

    async def sweep(self) -> None:
        """Remove the temporary files of processes that died since this store was opened."""
        ...


async def is_intact(
    blobs: BlobStore,
    digest: Digest,
    bytes_per_second: float = float("inf"),
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> bool:
    """Read a blob, as fast as it may be, and tell whether it has its digest.

    One that can't be read to its end has not. Raises `BlobNotFoundError`.
    """
    state = hashlib.sha256()
    try:
        async for block in blobs.read(digest):
            await asyncio.to_thread(state.update, block)
            if bytes_per_second < float("inf"):
                await sleep(len(block) / bytes_per_second)
    except OSError:
        return False
    return state.hexdigest() == digest.hex


async def content_of(blobs: BlobReader, digest: Digest) -> bytes:
    """Return all of a blob that is small; see `BlobReader.read`."""
    return b"".join([block async for block in blobs.read(digest)])


async def content_md5(blobs: BlobReader, digest: Digest) -> str:
    """Read a blob for its MD5 in base64, as in Content-MD5 (RFC 1864); see `BlobReader.read`."""
    state = hashlib.md5(usedforsecurity=False)
    async for block in blobs.read(digest):
        await asyncio.to_thread(state.update, block)
    return b64encode(state.digest()).decode()


@asynccontextmanager
async def local_files(blobs: BlobStore, digests: Iterable[Digest]) -> AsyncIterator[Mapping[Digest, Path]]:
    """Provide a file with each blob, fetched if the store has none; see `BlobReader.read`."""
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
