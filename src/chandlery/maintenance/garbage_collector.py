"""Keeps blobs and Nix's store within a limit, while builds and pulls go on.

When both together take more than the limit, this goes, until they take nine tenths of it:

1. of a Nix store of Chandlery's own, what no running build needs, as far as it takes more than a quarter of
   the limit: it only saves work for images to come;
2. blobs that no image in the index needs, the oldest first;
3. images, the least recently used first, and of their blobs those that no image needs that is kept. An image
   that was used within the grace time stays, since its client may still be fetching layers;
4. the rest of what can go of Nix's store;
5. images within the grace time, down to a tenth of it, but only if still more than twice the limit is taken.

Nothing is lost by it: an image that was collected is made again from its recipe when a client asks for it, by
name or by digest. An image is forgotten before its blobs are deleted; a crash in between leaves blobs that
nobody needs. How a blob is kept that somebody has just begun to count on is told in `leases`.

Blobs that aren't on this disk, but in a bucket, don't count and stay: then only Nix's store is collected.

It looks for garbage once in a while, and at once when a build wants it (`builds.wanted_collection`), or
when the disk has lost a part of the limit since, whoever has written it. Where less is free than builds need,
what nothing needs in Nix's store goes even without a limit: nothing new could be built otherwise.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from chandlery.builds.index import CollectorRecords, RecordedImage
from chandlery.builds.stores import Stores
from chandlery.builds.wanted_collection import WantedCollection
from chandlery.errors import ChandleryError
from chandlery.machine.free_disk import free_bytes
from chandlery.nix.nix import Nix
from chandlery.oci.digest import Digest
from chandlery.storage.blob_store import BlobInfo

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Shares of the limit: what is aimed at, what Nix's store may have of it, and what is far too much.
_TARGET = 0.9
_NIX_SHARE = 0.25
_FAR_TOO_MUCH = 2.0
# What the disk may lose of it until it is looked again.
_STEP = 0.05
# Of what builds need free, what is aimed at.
_FREE_TARGET = 1.25

# Seconds between looks whether a collection is due. From one to the next it takes so many times longer than a
# collection took, since builds that begin wait for it.
_POLL = 1.0
_PAUSE = 10.0

# Of the grace time, when far too much is taken.
_SHORT_GRACE = 0.1
# So often the use of an image has to be written, as a share of the grace time and in seconds.
_USE_SHARE = 0.02
_USE_INTERVAL = 60.0

# Images that were collected and can still be made again for who asks for one of their digests.
_REMEMBERED_RECIPES = 10_000

# Blobs that are deleted at a time: meanwhile no lease can be taken.
_BATCH = 64


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """How much blobs on this disk and Chandlery's own Nix store may take, in bytes, or 0 for no limit.

    An image that was used in the last `grace` seconds stays. With fewer `free` bytes nothing is built.
    """

    size: int = 0
    grace: float = 3600.0
    free: int = 0


def use_interval(grace: float) -> float:
    """Return how often the use of an image has to be written, in seconds, lest one in use looks unused."""
    return min(_USE_INTERVAL, _USE_SHARE * grace)


@dataclass(slots=True)
class Collected:
    """What a collection found and freed, or would free; sizes in bytes."""

    limit: int
    blobs: int
    nix: int
    freed_blobs: int = 0
    freed_nix: int = 0
    orphans: int = 0
    images: list[RecordedImage] = field(default_factory=list)

    @property
    def size(self) -> int:
        """What blobs and Nix's store take when this is done."""
        return self.blobs + self.nix - self.freed_blobs - self.freed_nix

    @property
    def excess(self) -> int:
        """What has still to go; negative if there is room."""
        return self.size - int(_TARGET * self.limit)


class GarbageCollector:
    """Collects garbage in a data folder that other processes may use at the same time."""

    def __init__(self, stores: Stores, limits: DiskLimits) -> None:
        self._blobs, self._leases, self._nix = stores.blobs, stores.leases, stores.nix
        self._index: CollectorRecords = stores.index
        self._limits = limits
        self._folder = stores.folder
        self._wanted = WantedCollection(stores.folder)

    async def run(self, interval: float) -> None:
        """Collect once in `interval` seconds, and when it is wanted or due, for ever."""
        while True:
            began = time.monotonic()
            try:
                await self.keep_limits()
            except ChandleryError as error:
                log.warning("garbage can't be collected", reason=str(error))
            await self._wait(interval, _PAUSE * (time.monotonic() - began))

    async def keep_limits(self) -> None:
        """Collect what has to go now, and what builds have left that somebody stopped."""
        if self._wanted.take():
            for nix in self._nix_stores:
                await nix.remove_left_sandboxes()
        await (self.collect() if self._limits.size else self.sweep())
        await self._make_room()

    async def _wait(self, interval: float, pause: float) -> None:
        """Wait `interval` seconds, or until a collection is due, if a `pause` has passed by then."""
        free, begin = free_bytes(self._folder), time.monotonic()
        while (passed := time.monotonic() - begin) < interval:
            lost = free - free_bytes(self._folder)
            is_due = self._wanted.is_wanted or (self._limits.size and lost > _STEP * self._limits.size)
            if passed >= pause and is_due:
                return
            await asyncio.sleep(min(_POLL, interval - passed))

    async def _make_room(self) -> None:
        """Remove what nothing needs from Nix's stores, if less is free than builds need."""
        before = free_bytes(self._folder)
        if before < self._limits.free:
            await self._collect_nix_stores(int(_FREE_TARGET * self._limits.free) - before)
            log.info("room was made for builds", free_before=before, free=free_bytes(self._folder))

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """Remove what dead processes left, and what has to go for the limit; or only tell what would go."""
        if not dry_run:
            await self.sweep()
        local = self._blobs.on_this_disk
        inventory = await self._blobs.inventory() if local else {}
        nix = sum(await self._nix_sizes())
        done = Collected(self._limits.size, sum(info.size for info in inventory.values()), nix)
        if done.limit and done.size > done.limit:
            images = deque(await self._index.least_recently_used() if local else ())
            references = await self._index.references()
            await self._collect(_Run(dry_run, inventory, images, references, done))
            log.info(
                "garbage collected",
                dry_run=dry_run,
                bytes=done.size,
                limit=done.limit,
                freed_blobs=done.freed_blobs,
                freed_nix=done.freed_nix,
                images=len(done.images),
            )
            if done.size > done.limit:
                log.warning(
                    "what is in use takes more than the disk limit", bytes=done.size, limit=done.limit
                )
        return done

    async def sweep(self) -> None:
        """Remove what dead processes left, and what has been remembered long enough."""
        await self._blobs.sweep()
        await self._leases.sweep()
        await self._index.forget_recipes(_REMEMBERED_RECIPES)

    async def _collect(self, run: "_Run") -> None:
        now, grace, limit = time.time(), self._limits.grace, run.done.limit
        await self._collect_nix(run, int(_NIX_SHARE * limit))
        await self._collect_orphans(run, now - grace)
        await self._collect_images(run, now - grace)
        await self._collect_nix(run, 0)
        if run.done.size > _FAR_TOO_MUCH * limit:
            await self._collect_images(run, now - _SHORT_GRACE * grace)

    async def _collect_nix(self, run: "_Run", share: int) -> None:
        """Free what can be freed of Nix's store, until it takes no more than a share."""
        done = run.done
        freed = -1
        # Nix counts what a path takes on the disk, which may be more than its nar size: so it is asked again.
        while (surplus := min(done.excess, done.nix - done.freed_nix - share)) > 0 and done.freed_nix > freed:
            freed = done.freed_nix
            if run.dry:
                done.freed_nix = min(freed + surplus, sum([await _garbage(nix) for nix in self._nix_stores]))
            else:
                await self._collect_nix_stores(surplus)
                done.freed_nix = done.nix - sum(await self._nix_sizes())

    async def _collect_orphans(self, run: "_Run", written_before: float) -> None:
        """Delete the oldest blobs that no image needs."""
        orphans = deque(
            digest
            for digest, info in sorted(run.inventory.items(), key=lambda item: (item[1].written_at, item[0]))
            if not run.references[digest] and info.written_at < written_before
        )
        while orphans and run.done.excess > 0:
            batch = [orphans.popleft() for _ in range(min(_BATCH, len(orphans)))]
            run.done.orphans += await self._delete(run, batch)

    async def _collect_images(self, run: "_Run", used_before: float) -> None:
        """Forget the least recently used images, and delete the blobs that only they need."""
        while run.images and run.done.excess > 0 and run.images[0].last_used < used_before:
            image = run.images.popleft()
            if run.dry or await self._index.forget_image(image.key, used_before):
                blobs = await self._index.blobs_of(image.key)
                run.references.subtract(list(blobs))
                await self._delete(run, [digest for digest in blobs if not run.references[digest]])
                run.done.images.append(image)

    async def _delete(self, run: "_Run", digests: Collection[Digest]) -> int:
        """Delete blobs that nobody needs; give how many."""
        if run.dry:
            unneeded = set(digests)
        else:
            async with self._leases.locked():
                # In this order, see `leases`: a build gives its lease back when the index has its image.
                leased = self._leases.leased()
                needed = await self._index.needed(digests)
                unneeded = set(digests) - leased - needed
                for digest in sorted(unneeded):
                    await self._blobs.delete(digest)
            await self._index.forget_layers(unneeded)
        run.done.freed_blobs += sum(run.inventory[each].size for each in unneeded if each in run.inventory)
        return len(unneeded)

    async def _collect_nix_stores(self, surplus: int) -> None:
        """Free so many bytes of Nix's stores, of the largest first."""
        sizes = await self._nix_sizes()
        for nix, size in sorted(zip(self._nix_stores, sizes, strict=True), key=lambda pair: -pair[1]):
            if surplus > 0:
                await nix.collect_garbage(surplus)
                surplus -= size - await _size(nix)

    async def _nix_sizes(self) -> list[int]:
        """Return how many bytes each of Nix's stores has that may be collected."""
        return [await _size(nix) for nix in self._nix_stores]

    @property
    def _nix_stores(self) -> Sequence[Nix]:
        """The stores that may be collected: the machine's may not."""
        return [nix for nix in self._nix.existing() if nix.owns_store]


@dataclass(frozen=True, slots=True)
class _Run:
    """One collection: what there was at its beginning, and what is left to decide about."""

    dry: bool
    inventory: Mapping[Digest, BlobInfo]
    images: deque[RecordedImage]  # the least recently used first
    references: Counter[Digest]  # by images that are kept
    done: Collected


async def _size(nix: Nix) -> int:
    return sum((await nix.sizes()).values())


async def _garbage(nix: Nix) -> int:
    """Return how many bytes of a store nothing protects."""
    sizes = await nix.sizes()
    return sum(sizes.get(path, 0) for path in await nix.garbage())
