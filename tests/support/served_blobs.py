"""Blobs of a store as the API serves them, where nothing is made again."""

from collections.abc import AsyncIterator
from pathlib import Path

from chandlery.machine.deadline import Deadline
from chandlery.oci.digest import Digest
from chandlery.storage.blob_store import BlobInfo, BlobStore
from chandlery.storage.byte_range import ByteRange


class AsTheyAre:
    """The blobs of a store; see `ServedBlobs`."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    async def obtain(self, digest: Digest, deadline: Deadline, client: str) -> BlobInfo | None:
        return await self._blobs.stat(digest)

    def path(self, digest: Digest) -> Path | None:
        return self._blobs.path(digest)

    async def url(self, digest: Digest, lifetime: float) -> str | None:
        return await self._blobs.url(digest, lifetime)

    def read(self, digest: Digest, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        return self._blobs.read(digest, byte_range)
