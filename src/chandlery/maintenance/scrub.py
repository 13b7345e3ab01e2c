"""Checks that every blob has its digest, and every image its blobs; makes again what lacks it.

A server scrubs slowly, all the time: what a disk loses is found before somebody pulls it. After a crash it
begins with the blobs that were written since all was known to be whole. `chandlery scrub` does it at once.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum

import structlog

from chandlery.builds.stores import Stores
from chandlery.errors import BlobNotFoundError, ChandleryError
from chandlery.maintenance.repaired_blobs import RepairedBlobs
from chandlery.oci.digest import Digest
from chandlery.storage.blob_store import BlobStore, is_intact

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_NOT_REPAIRED = "not repaired"

# File systems tell times in steps of at most 2 s.
_CLOCK_STEP = 2.0


class Problem(StrEnum):
    """What can be wrong with a blob."""

    DAMAGED = "damaged"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """A blob that isn't as it should be, an image that needs it, and what became of it.

    `image` is empty if no image that is kept needs the blob; `error` is empty if nothing is wrong any more.
    """

    digest: Digest
    problem: Problem
    image: str
    error: str


async def written_since(blobs: BlobStore, since: float) -> set[Digest]:
    """Return the blobs that were written since a time, in seconds since the epoch."""
    inventory = await blobs.inventory()
    return {digest for digest, info in inventory.items() if info.written_at > since - _CLOCK_STEP}


class Scrub:
    """Checks blobs against their digests and against the index; `repaired` makes again what it can.

    `blobs` and `bytes` count what has been checked.
    """

    def __init__(self, stores: Stores, repaired: RepairedBlobs) -> None:
        self._blobs, self._index = stores.blobs, stores.index
        self._repaired = repaired
        self.blobs = 0
        self.bytes = 0

    async def findings(
        self, *, repair: bool = True, bytes_per_second: float = float("inf")
    ) -> AsyncIterator[Finding]:
        """Check everything; give what is wrong, after it was repaired if `repair` says so."""
        self.blobs = self.bytes = 0
        images = await self._images_by_blob()
        inventory = await self._blobs.inventory()
        for digest, info in sorted(inventory.items()):
            damage = await self._damage(digest, images.get(digest, ""), repair, bytes_per_second)
            self.blobs += 1
            self.bytes += info.size
            if damage is not None:
                yield damage
        for digest in sorted(images.keys() - inventory.keys()):
            if not await self._index.needed([digest]):
                continue  # collected meanwhile
            # It may have been made again with another blob of its image.
            error = ""
            if await self._blobs.stat(digest) is None:
                error = await self._repair(digest) if repair else _NOT_REPAIRED
            yield Finding(digest, Problem.MISSING, images[digest], error)

    async def check_what_is_in_doubt(self) -> None:
        """Check the blobs that a crash may have damaged, at full speed."""
        images = await self._images_by_blob()
        for digest in sorted(self._repaired.in_doubt):
            _log(await self._damage(digest, images.get(digest, "")))
            self._repaired.in_doubt.discard(digest)

    async def run(self, interval: float, bytes_per_second: float) -> None:
        """Check everything once in `interval` seconds, for ever."""
        while True:
            began = time.monotonic()
            try:
                async for finding in self.findings(bytes_per_second=bytes_per_second):
                    _log(finding)
            except ChandleryError as error:
                log.warning("the scrub was broken off", reason=str(error))
            await asyncio.sleep(max(0.0, began + interval - time.monotonic()))

    async def _images_by_blob(self) -> dict[Digest, str]:
        """Return for every blob that is needed the name of an image that needs it."""
        images: dict[Digest, str] = {}
        for image in await self._index.least_recently_used():
            for digest in await self._index.blobs_of(image.key):
                images[digest] = image.name
        return images

    async def _damage(
        self, digest: Digest, image: str, repair: bool = True, bytes_per_second: float = float("inf")
    ) -> Finding | None:
        """Check a blob that the image of a name needs, or none; give what is wrong with it."""
        try:
            if await is_intact(self._blobs, digest, bytes_per_second):
                return None
        except BlobNotFoundError:  # collected meanwhile
            return None
        error = _NOT_REPAIRED
        if repair:
            await self._repaired.discard(digest, "its content has another digest")
            # One that only collected images needed is made again when somebody asks for it.
            collected = not image and await self._index.blob(digest) is not None
            error = "" if collected else await self._repair(digest)
        return Finding(digest, Problem.DAMAGED, image, error)

    async def _repair(self, digest: Digest) -> str:
        """Make a blob again; give why it can't be done, or nothing."""
        try:
            await self._repaired.repair(digest)
        except ChandleryError as error:
            return str(error)
        return ""


def _log(finding: Finding | None) -> None:
    if finding is not None:
        fields = {"problem": finding.problem, "image": finding.image, "error": finding.error}
        log.warning("a blob was not whole", digest=str(finding.digest), **fields)
