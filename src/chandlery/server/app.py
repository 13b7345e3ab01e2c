"""Puts the parts together: from settings to a builder, and to the application that a server runs."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware

from chandlery.access.client_address import is_loopback, parse_networks
from chandlery.access.control import AccessControl, Accounts
from chandlery.access.public_address import PublicAddress
from chandlery.access.tokens import Tokens, load_key
from chandlery.access.users import Users
from chandlery.builds.build_queue import BuildQueue, QueueLimits
from chandlery.builds.images import BuildCapacity, ImageBuilder
from chandlery.builds.index import BuildIndex
from chandlery.builds.pipeline import BuildLimits
from chandlery.builds.popularity_tables import PopularityTables
from chandlery.builds.recipe import BuildOptions
from chandlery.errors import ChandleryError, InvalidSourceError, SettingsError
from chandlery.image.name import LATEST, Vocabulary
from chandlery.image.profile import SHIPPED
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.machine.download import Address, DownloadFailedError
from chandlery.maintenance.background import Work, by_one, in_background, maintained
from chandlery.maintenance.garbage_collector import use_interval
from chandlery.nix.configuration import NixOptions
from chandlery.nix.nix import Nix, NixLimits
from chandlery.oci.documents import Platform
from chandlery.plan.popularity import Popularity
from chandlery.registry.api import Access, routes
from chandlery.registry.response_cache import PreparedAnswers
from chandlery.registry.waiting import WaitPolicy
from chandlery.server import monitoring
from chandlery.server.monitoring import Watchers
from chandlery.server.readiness import Readiness
from chandlery.server.request_log import RequestLog
from chandlery.server.tls import CertificateCopy, CertificateWatch
from chandlery.server.worker_reports import WorkerReports
from chandlery.settings.settings import Settings
from chandlery.settings.values import without_secrets
from chandlery.sources import package_source
from chandlery.sources.configured import ConfiguredSource, Sources
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.nixpkgs import NixpkgsAddresses
from chandlery.sources.package_source import SourceOptions
from chandlery.storage.blob_store import BlobStore
from chandlery.storage.leases import Leases
from chandlery.storage.object_store import open_blob_store
from chandlery.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from chandlery.server.tracing import Traces

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Seconds; granian gives up on workers that live for less than 5.5.
_AGAIN_IN = 10.0

# Revisions of the source at which images were made, and which it should keep.
_KEPT_REVISIONS = 12


@dataclass(frozen=True, slots=True)
class Parts:
    """What the settings describe, opened."""

    sources: Sources
    nix: Nix
    blobs: BlobStore
    index: BuildIndex
    leases: Leases
    popularity: Popularity


@asynccontextmanager
async def open_parts(settings: Settings, popularity: Popularity | None = None) -> AsyncIterator[Parts]:
    """Open the stores and check Nix; `popularity` is what the settings name, if that was read before.

    Raises `StorageError`, `NixError` and `SettingsError`.
    """
    nix = open_nix(settings)
    with (
        open_blob_store(
            settings.storage,
            settings.data_dir,
            settings.storage_options,
            redirects=settings.storage_redirects,
        ) as blobs,
        BuildIndex(settings.data_dir, use_interval=use_interval(settings.gc_grace)) as index,
        Leases(settings.data_dir) as leases,
    ):
        await nix.check()
        if popularity is None:
            popularity = await configured_popularity(settings)
        sources = open_sources(settings, nix)
        try:
            yield Parts(sources, nix, blobs, index, leases, popularity)
        finally:
            await sources.close()


async def configured_popularity(settings: Settings) -> Popularity:
    """Give the table that the settings name, empty if they name none. Raises `SettingsError`."""
    if not settings.popularity:
        return Popularity()
    try:
        return await PopularityTables(settings.data_dir).fetch(Address.parse(settings.popularity))
    except DownloadFailedError as error:
        raise SettingsError(f"popularity: {error}") from error
    except ValueError as error:
        raise SettingsError(f"popularity: {Address.parse(settings.popularity)}: {error}") from error


def open_nix(settings: Settings) -> Nix:
    """Make what calls Nix; nothing is called yet."""
    limits = NixLimits(
        settings.build_timeout,
        settings.evaluation_timeout,
        settings.nix_jobs,
        builder_timeout=settings.builder_timeout,
        evaluation_memory=settings.evaluation_memory,
    )
    options = NixOptions(
        settings.allowed_uris, settings.substituters, settings.trusted_public_keys, settings.host_paths
    )
    return Nix(settings.data_dir / "nix" if settings.nix_store == "own" else None, limits, options)


def open_sources(settings: Settings, nix: Nix) -> Sources:
    """Make the package sources; nothing is fetched yet. Raises `SettingsError`."""
    mirrors = DebianMirrors(settings.debian_mirror, settings.debian_security_mirror, settings.debian_keyring)
    nixpkgs = NixpkgsAddresses.parse(settings.nixpkgs_channel_url, settings.nixpkgs_tarball_url)
    sources = {}
    for name, each in settings.all_sources.items():
        lifetime = each.refresh or settings.source_refresh
        options = SourceOptions(each.tags, lifetime, each.config, each.overlays)
        try:
            source = package_source.parse(
                each.location, settings.data_dir, mirrors, options, nixpkgs=nixpkgs, nix=nix
            )
        except InvalidSourceError as error:
            raise SettingsError(f"{f'sources.{name}.from' if name else 'source'}: {error}") from error
        wanted = each.platforms or settings.platforms
        platforms = tuple(Platform("linux", architecture) for architecture in wanted)
        sources[name] = ConfiguredSource(source, platforms or source.platforms, lifetime)
    return Sources(sources, settings.default_source)


def vocabulary(settings: Settings) -> Vocabulary:
    """Say what the first parts of image names mean."""
    return Vocabulary(
        Platform.of_host(),
        frozenset(settings.sources),
        settings.default_source,
        {**SHIPPED, **settings.profiles},
    )


def access_control(settings: Settings, shared: Path | None = None) -> AccessControl | None:
    """Make the gate that the settings describe; None if everybody may have everything.

    `shared` is a folder for the workers of one server, see `AccessControl`. Raises `SettingsError`, also if
    other machines reach the server and nobody has said who may pull.
    """
    anonymous = settings.anonymous == "read"
    if settings.users_file is None:
        if not anonymous and not is_loopback(settings.host):
            raise SettingsError(
                f"other machines can reach {settings.host}: say who may pull, by users_file "
                '(`htpasswd -B` writes one), or let everybody by anonymous = "read"'
            )
        accounts = None
    else:
        if anonymous and not (settings.public_url or settings.tls_certificate):
            raise SettingsError(
                'anonymous = "read" beside users_file takes public_url: where clients get their tokens'
            )
        key = load_key(settings.token_key_file or settings.data_dir / "token-key")
        accounts = Accounts(Users(settings.users_file), Tokens(key, settings.token_lifetime), anonymous)
    if accounts is None and not settings.access.model_fields_set:
        return None
    address = PublicAddress(settings.public_url, parse_networks(settings.trusted_proxies))
    sources = {
        name: (without_secrets(each.location), *((name,) if name else ()))
        for name, each in settings.all_sources.items()
    }
    sources[""] = sources[settings.default_source]
    return AccessControl(settings.access, sources, address, accounts, shared)


def certificate(settings: Settings) -> CertificateCopy | None:
    """Give where the server's certificate is; None without one. Raises `SettingsError`."""
    if settings.tls_certificate is None or settings.tls_key is None:
        if settings.tls_certificate or settings.tls_key:
            raise SettingsError("tls_certificate and tls_key go together")
        return None
    return CertificateCopy(settings.tls_certificate, settings.tls_key, settings.data_dir / "tls.pem")


def image_builder(
    settings: Settings,
    parts: Parts,
    root_layer: RootLayerOptions | None = None,
    control: AccessControl | None = None,
    metrics: Metrics | None = None,
    workers: int = 1,
) -> ImageBuilder:
    """Make a builder that the caller enters; with several `workers` each has its part of what is allowed."""
    options = BuildOptions(
        settings.max_layers, settings.compression, settings.layer_strategy, root_layer or RootLayerOptions()
    )
    capacity = BuildCapacity(
        ceil(settings.packing_processes / workers),
        QueueLimits(
            settings.parallel_builds,
            ceil(settings.queued_builds / workers),
            settings.abandoned_build_grace,
            settings.failure_memory,
            *((control.admit_build,) if control else ()),
        ),
        BuildLimits(settings.max_packages, settings.max_closure_size, settings.min_free_disk),
    )
    return ImageBuilder(
        parts.sources,
        parts.nix,
        parts.blobs,
        parts.index,
        parts.leases,
        settings.data_dir,
        options,
        capacity,
        metrics,
        parts.popularity,
    )


def create_app(
    settings: Settings, shared: Path | None = None, popularity: Popularity | None = None
) -> Starlette:
    """Make the application; its lifespan opens the parts, and stops what still runs in the end.

    `shared` is a folder for the workers of one server alone, if it has several, and `popularity` is the table
    that all of them plan with.
    """
    metrics = Metrics()
    middleware = [Middleware(RequestLog, metrics=metrics)]
    traces = _traces(settings)
    if traces:
        middleware.append(traces.middleware)
    middleware.append(Middleware(PreparedAnswers))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            async with _dying_slowly():
                parts = await stack.enter_async_context(open_parts(settings, popularity))
                control = access_control(settings, shared)
                if traces:
                    stack.push_async_callback(asyncio.to_thread, traces.close)
                builder = image_builder(
                    settings, parts, control=control, metrics=metrics, workers=settings.workers
                )
                reports = None
                if shared:
                    reports = WorkerReports(shared, lambda: monitoring.report(metrics, builder.queue))
                    stack.callback(reports.publish)
                await stack.enter_async_context(builder)
                if traces:
                    builder.queue.observers.append(traces.built)
                proxies = parse_networks(settings.trusted_proxies)
                access = Access(WaitPolicy(settings.hold, settings.redirections), proxies, control)
                blobs = await stack.enter_async_context(
                    maintained(settings, parts.blobs, parts.index, parts.leases, parts.nix, builder)
                )
                app.router.routes.extend(routes(builder, blobs, vocabulary(settings), access))
                monitoring.count(metrics, builder.queue, settings.data_dir)
                watchers = Watchers(parse_networks(settings.metrics_networks), proxies)
                pages = monitoring.routes(metrics, _readiness(parts), builder.queue, watchers, reports)
                app.router.routes.extend(pages)
                await stack.enter_async_context(in_background(lambda: _keep(parts)))
                works: list[Work] = [lambda: _refresh(parts)]
                copy = certificate(settings)
                watch = CertificateWatch(copy, settings.tls_refresh) if copy else None
                if watch:
                    works.append(watch.run)
                _stop_at_sigterm(builder.queue, watch)
                await stack.enter_async_context(by_one(shared and shared / "duties.lock", works))
                if reports:
                    await stack.enter_async_context(in_background(reports.publish_always))
            yield

    app = Starlette(lifespan=lifespan, middleware=middleware)
    # A redirection would repeat whatever the Host header says.
    app.router.redirect_slashes = False
    return app


@asynccontextmanager
async def _dying_slowly() -> AsyncIterator[None]:
    """Let a worker that can't start say why, and wait before it dies.

    Workers that die as soon as they start are taken for hopeless: the server ends, with those that are well.
    """
    try:
        yield
    except ChandleryError as error:
        log.error("a worker can't start", reason=str(error), again_in=_AGAIN_IN)
        await asyncio.sleep(_AGAIN_IN)
        raise


def _readiness(parts: Parts) -> Readiness:
    """Say what a server needs to make and serve images; the build index isn't among it."""
    return Readiness(
        {
            "storage": parts.blobs.check,
            "nix": parts.nix.check,
            "source": lambda: parts.sources.of("").pin(LATEST, parts.sources.platforms("")[0]),
        }
    )


def _traces(settings: Settings) -> "Traces | None":
    """Import what makes traces, if they are wanted; without it a server does all the rest."""
    if not settings.traces:
        return None
    try:
        from chandlery.server.tracing import Traces
    except ImportError as error:
        log.warning("no traces are made: pip install 'chandlery[otel]'", reason=str(error))
        return None
    return Traces.to_collector()


def _stop_at_sigterm(queue: BuildQueue, watch: CertificateWatch | None) -> None:
    """Stop builds at SIGTERM, and the server after them.

    The server ends the lifespan after the last request, and some requests wait for builds. It stops at SIGINT
    as it does at SIGTERM. If another worker takes over, those who wait go on waiting there.
    """

    def stop() -> None:
        if watch is None or not watch.has_successor:
            queue.stop()
        signal.raise_signal(signal.SIGINT)

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)


async def _keep(parts: Parts) -> None:
    """Tell the sources again and again which revisions they should keep."""
    while True:
        for each in parts.sources:
            each.source.keep(parts.index.revisions(_KEPT_REVISIONS))
        await asyncio.sleep(60.0)


async def _refresh(parts: Parts) -> None:
    """Keep the sources fresh; while that fails, their last good pins serve."""
    async with asyncio.TaskGroup() as tasks:
        for each in parts.sources:
            tasks.create_task(_refresh_one(each))


async def _refresh_one(configured: ConfiguredSource) -> None:
    source = configured.source
    while True:
        try:
            await source.refresh(configured.pin_lifetime)
            # What image names choose by default is there before anybody asks.
            for platform in configured.platforms:
                await source.pin(LATEST, platform)
        except ChandleryError as error:
            log.warning("the package source can't be refreshed", source=source.text, error=str(error))
        await asyncio.sleep(min(configured.pin_lifetime, 60.0))
