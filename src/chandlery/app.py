"""Puts the parts together: from settings to a builder, and to the application that a server runs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware

from chandlery import package_source
from chandlery.blob_store import FileBlobStore
from chandlery.build_index import BuildIndex
from chandlery.build_queue import QueueLimits
from chandlery.client_address import parse_networks
from chandlery.debian_index import DebianMirrors
from chandlery.errors import ChandleryError
from chandlery.image_builder import BuildCapacity, BuildLimits, BuildOptions, ImageBuilder
from chandlery.nix import Nix, NixLimits
from chandlery.oci import Platform
from chandlery.package_source import PackageSource
from chandlery.registry_api import Access, routes
from chandlery.request_log import RequestLog
from chandlery.root_layer import RootLayerOptions
from chandlery.settings import Settings
from chandlery.waiting import WaitPolicy

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Parts:
    """What the settings describe, opened."""

    source: PackageSource
    nix: Nix
    blobs: FileBlobStore
    index: BuildIndex


@asynccontextmanager
async def open_parts(settings: Settings) -> AsyncIterator[Parts]:
    """Open the stores and check Nix. Raises `StorageError`, `NixError` and `InvalidSourceError`."""
    mirrors = DebianMirrors(settings.debian_mirror, settings.debian_security_mirror, settings.debian_keyring)
    source = package_source.parse(settings.source, settings.data_dir, mirrors)
    limits = NixLimits(settings.build_timeout, settings.evaluation_timeout, settings.nix_jobs)
    nix = Nix(settings.data_dir / "nix" if settings.nix_store == "own" else None, limits)
    with FileBlobStore(settings.data_dir) as blobs, BuildIndex(settings.data_dir) as index:
        await nix.check()
        yield Parts(source, nix, blobs, index)


def image_builder(
    settings: Settings, parts: Parts, root_layer: RootLayerOptions | None = None
) -> ImageBuilder:
    """Make a builder that the caller enters."""
    options = BuildOptions(
        settings.max_layers, settings.compression, settings.layer_strategy, root_layer or RootLayerOptions()
    )
    capacity = BuildCapacity(
        settings.packing_processes,
        QueueLimits(
            settings.parallel_builds,
            settings.queued_builds,
            settings.abandoned_build_grace,
            settings.failure_memory,
        ),
        BuildLimits(settings.max_packages, settings.max_closure_size, settings.min_free_disk),
    )
    return ImageBuilder(
        parts.source, parts.nix, parts.blobs, parts.index, settings.data_dir, options, capacity
    )


def create_app(settings: Settings) -> Starlette:
    """Make the application; its lifespan opens the parts, and stops what still runs in the end."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with open_parts(settings) as parts, image_builder(settings, parts) as builder:
            access = Access(
                WaitPolicy(settings.hold, settings.redirections), parse_networks(settings.trusted_proxies)
            )
            app.router.routes.extend(routes(builder, parts.blobs, Platform.of_host(), access))
            refreshing = asyncio.create_task(_refresh(parts.source, settings.source_refresh))
            try:
                yield
            finally:
                refreshing.cancel()

    return Starlette(lifespan=lifespan, middleware=[Middleware(RequestLog)])


async def _refresh(source: PackageSource, interval: float) -> None:
    """Keep the source fresh; while that fails, its last good state serves."""
    while True:
        try:
            await source.refresh(interval)
        except ChandleryError as error:
            log.warning("the package source can't be refreshed", source=source.text, error=str(error))
        await asyncio.sleep(min(interval, 60.0))
