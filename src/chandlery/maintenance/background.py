"""What keeps a data folder in order while servers run: repair, checks, garbage collection, unfinished builds.

Every process repairs what it is asked for. The rest is done by one of all that share the folder: by whichever
holds the lock of `maintenance.lock`, as long as it lives, and then by another.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from pathlib import Path

import structlog

from chandlery.builds.images import Images
from chandlery.builds.stores import Stores
from chandlery.machine.locks import leader
from chandlery.maintenance.garbage_collector import DiskLimits, GarbageCollector
from chandlery.maintenance.repaired_blobs import RepairedBlobs
from chandlery.maintenance.run_marker import RunMarker
from chandlery.maintenance.scrub import Scrub, written_since
from chandlery.oci.digest import Digest
from chandlery.settings.settings import Settings
from chandlery.storage.blob_store import BlobStore

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Seconds between looks for builds that somebody left who died.
_TAKE_OVER_INTERVAL = 5.0

Work = Callable[[], Awaitable[None]]


@asynccontextmanager
async def maintained(settings: Settings, stores: Stores, images: Images) -> AsyncIterator[RepairedBlobs]:
    """Check, repair and collect in the background; the body gets the blobs as clients get them."""
    blobs = stores.blobs
    marker = RunMarker(settings.data_dir)
    since = marker.begin()
    in_doubt = set[Digest]()
    # A crash of this machine damages nothing in a bucket.
    if since is not None and blobs.on_this_disk:
        in_doubt = await written_since(blobs, since)
        log.warning("the last server was killed: its blobs are checked", blobs=len(in_doubt))
    limits = DiskLimits(settings.disk_limit, settings.gc_grace, settings.min_free_disk)
    collector = GarbageCollector(stores, limits)
    async with stores.leases.lease() as lease:
        repaired = RepairedBlobs(stores, images, lease, in_doubt)
        scrub = Scrub(stores, repaired)
        works: list[Work] = [
            lambda: _check(scrub, marker, settings, _scrub_rate(settings, blobs)),
            lambda: collector.run(settings.collect_interval),
            lambda: _take_over(images),
        ]
        async with by_one(settings.data_dir / "maintenance.lock", works):
            yield repaired
    marker.end()


@asynccontextmanager
async def by_one(lock: Path | None, works: Sequence[Work]) -> AsyncIterator[None]:
    """While the body runs, do what goes on for ever: here, unless another process that has the lock does it.

    What one of the works dies of is logged, and ends no other. Without a lock there is no other process.
    """

    async def work() -> None:
        async with leader(lock) if lock else nullcontext(), AsyncExitStack() as stack:
            for each in works:
                await stack.enter_async_context(in_background(each))
            await asyncio.Event().wait()

    async with in_background(work):
        yield


@asynccontextmanager
async def in_background(work: Work) -> AsyncIterator[None]:
    """Run something that goes on for ever while the body runs; what it dies of is logged."""
    task = asyncio.ensure_future(work())
    task.add_done_callback(_log_failure)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _scrub_rate(settings: Settings, blobs: BlobStore) -> int:
    """Return how many bytes per second are checked; of a bucket none, unless somebody wants to pay for it."""
    return settings.scrub_rate if blobs.on_this_disk or "scrub_rate" in settings.model_fields_set else 0


async def _check(scrub: Scrub, marker: RunMarker, settings: Settings, rate: int) -> None:
    await scrub.check_what_is_in_doubt()
    marker.whole()
    if rate:
        await scrub.run(settings.scrub_interval, rate)


async def _take_over(images: Images) -> None:
    while not images.queue.stopping:
        try:
            await images.take_over()
        except OSError as error:
            log.warning("unfinished builds can't be taken over now", reason=str(error))
        await asyncio.sleep(_TAKE_OVER_INTERVAL)


def _log_failure(task: "asyncio.Future[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("a background task failed", exc_info=task.exception())
