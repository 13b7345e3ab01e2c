"""Blobs as clients get them: one that is missing or damaged is made again, and has the same digest.

The index knows the size of every blob, and what the images that need it were made from. A blob that isn't
there, has another size, or is in doubt after a crash and lacks its digest, is built again through the queue:
once, however many ask. The result is the same to the byte, or an error that says why there is none. What was
lost counts for no client, and what was collected for the one that asks for it.

What is handed out stays: an image is in use when one of its blobs is asked for, and a blob that belongs to no
image that is kept has a lease for as long as it takes to open it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import structlog

from chandlery.builds.build_queue import SELF_REPAIR
from chandlery.builds.images import Images
from chandlery.builds.index import BlobRecords, RecordedBlob
from chandlery.builds.recipe import Recipe
from chandlery.builds.stores import Stores
from chandlery.errors import BlobNotFoundError, ChandleryError, StorageError, TryAgainError
from chandlery.machine.deadline import NO_DEADLINE, Deadline
from chandlery.oci.digest import Digest
from chandlery.oci.documents import OCI_INDEX
from chandlery.storage.blob_store import BlobInfo, BlobStore, is_intact
from chandlery.storage.byte_range import ByteRange
from chandlery.storage.leases import Lease

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# How many images are tried that need the same blob.
_RECIPES = 3
# How often an image is made again for one blob.
_ATTEMPTS = 3

# Seconds for which a blob of no kept image is leased when it is asked for; the server opens it at once.
_OPENING = 60.0

_MOST_RECENT = 50_000


class RepairedBlobs:
    """Blobs as the API serves them (`registry.api.ServedBlobs`).

    Blobs `in_doubt` have their digest checked before they are served; whoever finds one whole takes it out.
    """

    def __init__(self, stores: Stores, images: Images, lease: Lease, in_doubt: Iterable[Digest] = ()) -> None:
        self.in_doubt = set(in_doubt)
        self._blobs: BlobStore = stores.blobs
        self._index: BlobRecords = stores.index
        self._use_interval = stores.index.use_interval
        self._image_index = stores.index.image_index
        self._images = images
        self._lease = lease
        self._recent: dict[Digest, tuple[float, RecordedBlob]] = {}
        self._leased: dict[Digest, asyncio.TimerHandle] = {}

    async def obtain(self, digest: Digest, deadline: Deadline, client: str = SELF_REPAIR) -> BlobInfo | None:
        """Return what is known of a blob that is there and whole, made again if need be.

        None means that no image ever needed it. A manifest is whole if its image is. Raises
        `BuildPendingError` at the deadline, when it is still being made again, and `BlobNotFoundError` with
        the reason if it can't be. `client` is whose build it is if the image had been collected.
        """
        recorded = await self._in_use(digest)
        if recorded is None or not recorded.kept:
            await self._lease_for_a_moment(digest)
        info = await self._sound(digest, recorded)
        if recorded is None:
            return info or await self._put_image_index(digest)
        if info is not None and (not recorded.is_manifest or await self._images.is_known(recorded.key)):
            return info
        return await self.repair(digest, deadline, SELF_REPAIR if recorded.kept else client)

    def path(self, digest: Digest) -> Path | None:
        """See `BlobStore`."""
        return self._blobs.path(digest)

    async def url(self, digest: Digest, lifetime: float) -> str | None:
        """See `BlobStore`; ask `stat` first, as nothing repairs what isn't there when a client comes."""
        return await self._blobs.url(digest, lifetime)

    def read(self, digest: Digest, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        """See `BlobStore`."""
        return self._blobs.read(digest, byte_range)

    async def repair(
        self, digest: Digest, deadline: Deadline = NO_DEADLINE, client: str = SELF_REPAIR
    ) -> BlobInfo:
        """Make a blob again that is not there; see `obtain`."""
        reasons = []
        for recipe in await self._index.recipes(digest, _RECIPES):
            try:
                info = await self._made_again(digest, recipe, deadline, client)
            except (TryAgainError, StorageError):
                raise
            except ChandleryError as error:
                reasons.append(str(error))
                continue
            if info is not None:
                log.info("blob made again", digest=str(digest), bytes=info.size, image=recipe.title)
                return info
            reasons.append(f"{recipe.title} was made again, and is another image now")
        reason = "; ".join(dict.fromkeys(reasons)) or "no image is known that needs it"
        log.error("a blob can't be made again", digest=str(digest), reason=reason)
        raise BlobNotFoundError(str(digest), reason)

    async def _made_again(
        self, digest: Digest, recipe: Recipe, deadline: Deadline, client: str
    ) -> BlobInfo | None:
        """Make an image again; give what is known of a blob of it, None if it isn't one of its blobs now."""
        for _ in range(_ATTEMPTS):
            image = await self._images.remake(recipe, client, deadline)
            info = await self._blobs.stat(digest)
            if info is not None or digest not in {each.digest for each in image.descriptors}:
                return info
            # A build that was under way had seen the blob before it was found to be damaged.
        return None

    async def discard(self, digest: Digest, reason: str) -> None:
        """Remove a damaged blob, so that it is made again."""
        log.error("a damaged blob is removed", digest=str(digest), reason=reason)
        await self._blobs.delete(digest)
        self.in_doubt.discard(digest)

    async def _in_use(self, digest: Digest) -> RecordedBlob | None:
        """Return what the index knows of a blob, and note that an image is in use."""
        seen_at, recorded = self._recent.get(digest, (0.0, None))
        if recorded is not None and time.monotonic() - seen_at < self._use_interval:
            return recorded
        recorded = await self._index.blob(digest)
        if recorded is None or not recorded.kept:
            return recorded
        if not await self._index.remember_use(recorded.key):
            return RecordedBlob(recorded.key, recorded.size, recorded.is_manifest, kept=False)
        if len(self._recent) >= _MOST_RECENT:
            self._recent.clear()
        self._recent[digest] = (time.monotonic(), recorded)
        return recorded

    async def _sound(self, digest: Digest, recorded: RecordedBlob | None) -> BlobInfo | None:
        """Return what is known of a blob; one that is damaged is removed."""
        info = await self._blobs.stat(digest)
        if info is None:
            self.in_doubt.discard(digest)
            return None
        if recorded is not None and info.size != recorded.size:
            await self.discard(digest, f"it has {info.size} bytes, and should have {recorded.size}")
            return None
        if digest in self.in_doubt:
            try:
                intact = await is_intact(self._blobs, digest)
            except BlobNotFoundError:
                # Whoever else looks at what is in doubt has found it to be damaged.
                return None
            if not intact:
                await self.discard(digest, "it lacks its digest after a crash")
                return None
            self.in_doubt.discard(digest)
        return info

    async def _put_image_index(self, digest: Digest) -> BlobInfo | None:
        """Put an OCI index again that was collected: no image needs it, and it is small."""
        content = await self._image_index(digest)
        if content is None:
            return None
        await self._lease.take(digest)
        await self._blobs.put_bytes(content, OCI_INDEX)
        await self._lease_for_a_moment(digest)
        return BlobInfo(len(content))

    async def _lease_for_a_moment(self, digest: Digest) -> None:
        """Lease a blob, if it is there, until whoever asked has opened it."""
        if await self._blobs.stat(digest) is None:
            return
        await self._lease.take(digest)
        if digest in self._leased:
            self._leased[digest].cancel()
        self._leased[digest] = asyncio.get_running_loop().call_later(_OPENING, self._end_lease, digest)

    def _end_lease(self, digest: Digest) -> None:
        del self._leased[digest]
        self._lease.give_back(digest)
