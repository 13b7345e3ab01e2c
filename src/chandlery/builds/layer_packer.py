"""Packs groups of store paths into layer blobs, each once, in worker processes.

Every blob is leased before it is looked for or put, so that no collector takes it before the build index has
the image that needs it.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from chandlery.builds.job import Job
from chandlery.builds.known_images import KnownImages
from chandlery.builds.stores import Stores
from chandlery.layers.archive import layer_key, pack_store_paths
from chandlery.layers.compression import COMPRESSIONS
from chandlery.machine.process_pool import ProcessPool
from chandlery.oci.documents import PackedLayer
from chandlery.plan.layer_group import LayerGroup
from chandlery.telemetry.build_timings import Work
from chandlery.telemetry.metrics import Metrics

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class LayerPacker:
    """Packs layers of any build, at most as many at once as `pool` has processes."""

    def __init__(self, stores: Stores, known: KnownImages, pool: ProcessPool, metrics: Metrics) -> None:
        self._stores = stores
        self._known = known
        self._pool = pool
        self._metrics = metrics
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def known(self, job: Job, groups: Sequence[LayerGroup]) -> dict[LayerGroup, PackedLayer]:
        """Return the layers of those groups that were packed before, and are there."""
        keys = {group: _key(job, group) for group in groups}
        recorded = await self._stores.index.layers(list(keys.values()))
        found = {group: recorded[key] for group, key in keys.items() if key in recorded}
        await job.lease.take(*(layer.descriptor.digest for layer in found.values()))
        there = await asyncio.gather(*(self._known.has(layer.descriptor) for layer in found.values()))
        known = {
            group: layer for (group, layer), is_there in zip(found.items(), there, strict=True) if is_there
        }
        self._metrics.looked_up("layer", hits=len(known))
        return known

    async def pack(self, job: Job, group: LayerGroup) -> PackedLayer:
        """Return a group's layer, packing it unless it is known; never twice at once."""
        key = _key(job, group)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            recorded = await self._stores.index.layers([key])
            if key in recorded:
                await job.lease.take(recorded[key].descriptor.digest)
                if await self._known.has(recorded[key].descriptor):
                    self._metrics.looked_up("layer", hits=1)
                    return recorded[key]
            self._metrics.looked_up("layer", misses=1)
            with self._stores.blobs.temporary_file() as file:
                with job.build.timings.during(Work.PACK):
                    compression = job.recipe.options.compression
                    packed = await self._pool.run(
                        pack_store_paths, job.nix.store_root, group.store_paths, compression, file
                    )
                await self.put(job, packed, file)
            await self._stores.index.remember_layer(key, packed)
            log.debug("layer packed", digest=str(packed.descriptor.digest), bytes=packed.descriptor.size)
            return packed

    async def put(self, job: Job, layer: PackedLayer, file: Path) -> None:
        """Put a layer that was packed into a file."""
        await job.lease.take(layer.descriptor.digest)
        with job.build.timings.during(Work.STORE):
            await self._stores.blobs.put(layer.descriptor.digest, file, layer.descriptor.media_type)
        self._metrics.packed(layer.descriptor.size)


def _key(job: Job, group: LayerGroup) -> str:
    return layer_key(
        group.store_paths, COMPRESSIONS[job.recipe.options.compression], job.recipe.pin.trust_domain
    )
