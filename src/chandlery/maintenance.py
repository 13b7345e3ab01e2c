"""What keeps a data folder in order while a server runs: repair, checks, garbage collection."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import structlog

from chandlery.blob_store import BlobStore
from chandlery.build_index import BuildIndex
from chandlery.data_folder import RunMarker
from chandlery.digest import Digest
from chandlery.garbage_collector import DiskLimits, GarbageCollector
from chandlery.image_builder import ImageBuilder
from chandlery.leases import Leases
from chandlery.nix import Nix
from chandlery.repaired_blobs import RepairedBlobs
from chandlery.scrub import Scrub, written_since
from chandlery.settings import Settings

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


@asynccontextmanager
async def maintained(
    settings: Settings,
    blobs: BlobStore,
    index: BuildIndex,
    leases: Leases,
    nix: Nix,
    builder: ImageBuilder,
) -> AsyncIterator[RepairedBlobs]:
    """Check, repair and collect in the background; give the blobs as clients get them."""
    marker = RunMarker(settings.data_dir)
    since = marker.begin()
    in_doubt = set[Digest]()
    # A crash of this machine damages nothing in a bucket.
    if since is not None and blobs.on_this_disk:
        in_doubt = await written_since(blobs, since)
        log.warning("the last server was killed: its blobs are checked", blobs=len(in_doubt))
    limits = DiskLimits(settings.disk_limit, settings.gc_grace)
    collector = GarbageCollector(blobs, index, leases, nix, limits)
    async with leases.lease() as lease:
        repaired = RepairedBlobs(blobs, index, builder, lease, settings.hold, in_doubt)
        checks = _check(Scrub(blobs, index, repaired), marker, settings, _scrub_rate(settings, blobs))
        async with _in_background(checks), _in_background(collector.run(settings.collect_interval)):
            yield repaired
    marker.end(whole=not repaired.in_doubt)


def _scrub_rate(settings: Settings, blobs: BlobStore) -> int:
    """Give how many bytes per second are checked; of a bucket none, unless somebody wants to pay for it."""
    return settings.scrub_rate if blobs.on_this_disk or "scrub_rate" in settings.model_fields_set else 0


async def _check(scrub: Scrub, marker: RunMarker, settings: Settings, rate: int) -> None:
    await scrub.check_what_is_in_doubt()
    marker.whole()
    if rate:
        await scrub.run(settings.scrub_interval, rate)


@asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run something that goes on for ever while the body runs; what it dies of is logged."""
    task = asyncio.create_task(work)
    task.add_done_callback(_log_failure)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("a background task failed", exc_info=task.exception())
