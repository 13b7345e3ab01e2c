"""The blob store in an object store, which several servers may share.

    <prefix>/blobs/sha256/<first two digits>/<64 digits>
    <prefix>/check/<random>                                what `check` writes, for a moment

An object is there with all its bytes or not at all: stores put it in one step, multipart uploads too, and S3
checks each part's sha256. A blob is written on this machine's disk first, so that its digest is known, and
goes up from there in pieces: memory holds a few pieces of a few blobs, whatever their size.

Nothing is deleted here to make room: other servers may count on a blob that this one doesn't know. Rules of
the bucket may delete what they like, since what is missing is made again when somebody asks for it. They
should remove the parts of uploads that were broken off.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from secrets import token_hex
from typing import Self

import obstore
import structlog
from obstore.exceptions import BaseError

from chandlery.errors import BlobNotFoundError, StorageError
from chandlery.machine.temporary_folder import TemporaryFolder
from chandlery.oci.digest import Digest
from chandlery.oci.documents import Descriptor
from chandlery.storage.blob_store import BlobInfo
from chandlery.storage.bucket import Bucket, Connection, Retries
from chandlery.storage.byte_range import ByteRange

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_READ_SIZE = 1 << 20

# Bytes of one part of an upload, and how many parts of how many blobs are in memory: 64 MiB in all.
_PART = 8 << 20
_PARTS_AT_ONCE = 2
_UPLOADS_AT_ONCE = 4
# S3 takes 10,000 parts.
_MOST_PARTS = 9_000

# An image that is known has up to a hundred blobs, and each of them is looked up.
_LOOKUPS_AT_ONCE = 16
# Seconds for which a blob that was seen is taken to be there.
_MEMORY = 10.0
_MOST_SEEN = 50_000

# Seconds for all that is small, repeated requests included.
_PATIENCE = 20.0
_RETRIES = Retries(most=8, seconds=15.0)
# Who checks a store, or waits for a URL, wants to know soon that something is wrong.
_IMPATIENT = Retries(most=1, seconds=2.0)

# Seconds until URLs are tried again; to sign them takes a key, or a request to the cloud.
_SIGN_AGAIN = 60.0

_FOLDER = "blobs/sha256"
_KEY = re.compile(_FOLDER + r"/([0-9a-f]{2})/(\1[0-9a-f]{62})")


class ObjectBlobStore:
    """The store in a bucket; `folder` has its temporary files.

    Clients get URLs of the bucket if `redirects` says so. A blob that was seen is taken to be there for
    `memory` seconds, so for as long one that somebody else has deleted isn't made again.
    """

    on_this_disk = False

    def __init__(
        self,
        bucket: Bucket,
        options: Mapping[str, str],
        folder: Path,
        *,
        redirects: bool = True,
        memory: float = _MEMORY,
    ) -> None:
        self._bucket = bucket
        self._store = bucket.connect(options, _RETRIES)
        self._impatient = bucket.connect(options, _IMPATIENT)
        self._redirects = redirects
        self._memory = memory
        self._unsigned_until = 0.0
        self._seen: dict[Digest, tuple[float, BlobInfo]] = {}
        self._uploads = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        self._lookups = asyncio.Semaphore(_LOOKUPS_AT_ONCE)
        self._temporary = TemporaryFolder(folder / "tmp")

    async def check(self) -> None:
        """See `BlobStore`."""
        await asyncio.to_thread(self._temporary.check)
        key, content = f"check/{token_hex(8)}", b"written by chandlery to see whether it can be\n"
        async with self._small():
            await obstore.put_async(self._impatient, key, content, use_multipart=False)
            read = await (await obstore.get_async(self._impatient, key)).bytes_async()
            if bytes(read) != content:
                raise StorageError(f"{self._bucket}: what was written to it can't be read again")
            await obstore.delete_async(self._impatient, key)
            # Who mustn't list gets a 403 for what isn't there, and then no blob could be looked up.
            await self._head(self._impatient, key)

    def path(self, digest: Digest) -> None:
        """See `BlobReader`: there is no file."""
        return

    def location(self, digest: Digest) -> str:
        """See `BlobReader`."""
        return f"{self._bucket}/{_key(digest)}"

    async def url(self, digest: Digest, lifetime: float) -> str | None:
        """See `BlobReader`; whoever has the URL may read the blob. If none can be signed, that is logged."""
        if not self._redirects or time.monotonic() < self._unsigned_until:
            return None
        try:
            async with asyncio.timeout(_PATIENCE):
                return await obstore.sign_async(
                    self._impatient, "GET", _key(digest), timedelta(seconds=lifetime)
                )
        except (BaseError, TimeoutError) as error:
            self._unsigned_until = time.monotonic() + _SIGN_AGAIN
            log.warning("clients get blobs through this server", reason=str(self._bucket.error(error)))
            return None

    async def stat(self, digest: Digest) -> BlobInfo | None:
        """See `BlobReader`."""
        seen_at, info = self._seen.get(digest, (0.0, None))
        if info is not None and time.monotonic() - seen_at < self._memory:
            return info
        return await self._look_up(digest)

    async def read(self, digest: Digest, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        """See `BlobReader`; one that breaks off goes on from there, if the store answers soon again."""
        options: obstore.GetOptions = {"range": (byte_range.start, byte_range.stop)} if byte_range else {}
        with self._errors():
            try:
                result = await obstore.get_async(self._store, _key(digest), options=options)
            except FileNotFoundError:
                self._seen.pop(digest, None)
                raise BlobNotFoundError(str(digest)) from None
            async for block in result.stream(min_chunk_size=_READ_SIZE):
                yield bytes(block)

    def temporary_file(self) -> AbstractContextManager[Path]:
        """See `BlobStore`."""
        return self._temporary.file()

    async def put(self, digest: Digest, file: Path, media_type: str) -> None:
        """See `BlobStore`."""
        try:
            # Another server may have put it; it costs less to ask than to upload.
            if await self._look_up(digest) is None:
                size = file.stat().st_size
                async with self._uploads:
                    await self._upload(digest, file, size, media_type)
                await self._confirm(digest, size)
        finally:
            file.unlink(missing_ok=True)

    async def put_bytes(self, content: bytes, media_type: str) -> Descriptor:
        """See `BlobStore`."""
        digest = Digest.of(content)
        async with self._small():
            await obstore.put_async(
                self._store,
                _key(digest),
                content,
                attributes={"Content-Type": media_type},
                use_multipart=False,
            )
        await self._confirm(digest, len(content))
        return Descriptor(media_type, digest, len(content))

    async def delete(self, digest: Digest) -> None:
        """See `BlobStore`."""
        self._seen.pop(digest, None)
        async with self._small():
            try:
                await obstore.delete_async(self._store, _key(digest))
            except FileNotFoundError:
                return

    async def digests(self) -> AsyncIterator[Digest]:
        """See `BlobStore`."""
        for digest in sorted(await self.inventory()):
            yield digest

    async def inventory(self) -> Mapping[Digest, BlobInfo]:
        """See `BlobStore`."""
        found = {}
        with self._errors():
            async for listed in obstore.list(self._store, _FOLDER, chunk_size=1000):
                for meta in listed:
                    if match := _KEY.fullmatch(meta["path"]):
                        found[Digest(match[2])] = _info(meta)
        return found

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

    async def _upload(self, digest: Digest, file: Path, size: int, media_type: str) -> None:
        with self._errors():
            await obstore.put_async(
                self._store,
                _key(digest),
                file,
                attributes={"Content-Type": media_type},
                chunk_size=max(_PART, size // _MOST_PARTS),
                max_concurrency=_PARTS_AT_ONCE,
            )

    async def _confirm(self, digest: Digest, size: int) -> None:
        """Raise `StorageError` unless the blob that was put is there, and has its size in bytes."""
        info = await self._look_up(digest)
        if info is None or info.size != size:
            kept = "nothing" if info is None else f"{info.size} bytes"
            raise StorageError(f"{self._bucket}: {digest} was put with {size} bytes, and {kept} is there")

    async def _look_up(self, digest: Digest) -> BlobInfo | None:
        """Ask the store about a blob, and remember it if it is there."""
        async with self._lookups, self._small():
            info = await self._head(self._store, _key(digest))
        self._seen.pop(digest, None)
        if info is not None:
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen[digest] = (time.monotonic(), info)
        return info

    async def _head(self, store: Connection, key: str) -> BlobInfo | None:
        try:
            return _info(await obstore.head_async(store, key))
        except FileNotFoundError:
            return None

    @asynccontextmanager
    async def _small(self) -> AsyncIterator[None]:
        """Bound the time that something small takes; see `_errors`."""
        with self._errors():
            async with asyncio.timeout(_PATIENCE):
                yield

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what obstore says into `StorageError`, without its secrets."""
        try:
            yield
        except (BaseError, FileNotFoundError, TimeoutError) as error:
            raise self._bucket.error(error) from None


def _key(digest: Digest) -> str:
    return f"{_FOLDER}/{digest.hex[:2]}/{digest.hex}"


def _info(meta: "obstore.ObjectMeta") -> BlobInfo:
    return BlobInfo(meta["size"], meta["last_modified"].timestamp())
