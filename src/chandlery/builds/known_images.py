"""Which images are known and whole, so that they need no build."""

import asyncio
from collections.abc import Iterable

import structlog

from chandlery.builds.index import ImageRecords
from chandlery.oci.documents import BuiltImage, Descriptor
from chandlery.storage.blob_store import BlobStore

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class KnownImages:
    """The images of an index whose blobs are all in a store."""

    def __init__(self, index: ImageRecords, blobs: BlobStore) -> None:
        self._index = index
        self._blobs = blobs

    async def find(self, key: str) -> BuiltImage | None:
        """Return the image of a recipe's key if it is kept and whole; then it is in use, so it stays."""
        image = await self._index.use_image(key)
        if image is None or await asyncio.to_thread(self._are_files, image.descriptors):
            return image
        # Together, as each takes a round trip if the blobs are in a bucket.
        there = await asyncio.gather(*map(self.has, image.descriptors))
        if all(there):
            return image
        log.warning("a known image lacks blobs", missing=there.count(False))
        return None

    async def has(self, descriptor: Descriptor) -> bool:
        """Return whether a blob is there; one that has another size is removed, so that it is made again."""
        info = await self._blobs.stat(descriptor.digest)
        if info is not None and info.size != descriptor.size:
            log.warning("a blob is damaged", digest=str(descriptor.digest), bytes=info.size)
            await self._blobs.delete(descriptor.digest)
            return False
        return info is not None

    def _are_files(self, descriptors: Iterable[Descriptor]) -> bool:
        """Return whether blobs are there, seen as files: False if the store has none, or one isn't whole."""
        for each in descriptors:
            path = self._blobs.path(each.digest)
            try:
                if path is None or path.stat().st_size != each.size:
                    return False
            except OSError:
                return False
        return True
