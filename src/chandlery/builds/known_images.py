"""Which images are known and whole, so that they need no build."""

import asyncio
import os
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
        if image is None:
            return None
        if self._blobs.on_this_disk and await asyncio.to_thread(self._are_files, image.descriptors):
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
        """Return whether all blobs are there, seen as files in one go; False if one isn't whole."""
        try:
            return all(_file_size(self._blobs.location(each.digest)) == each.size for each in descriptors)
        except OSError:
            return False


def _file_size(path: str) -> int:
    # Making a `Path` takes longer than the look, and a known image has a blob for each of its layers.
    return os.stat(path).st_size  # noqa: PTH116
