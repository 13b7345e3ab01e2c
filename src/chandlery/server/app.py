"""The application that a server runs, put together from its parts."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware

from chandlery.access.client_address import parse_networks
from chandlery.builds.build_queue import BuildQueue
from chandlery.errors import ChandleryError
from chandlery.image.name import LATEST
from chandlery.maintenance.background import Work, by_one, in_background, maintained
from chandlery.plan.popularity import Popularity
from chandlery.registry import api
from chandlery.registry.api import Access
from chandlery.registry.response_cache import ResponseCache
from chandlery.registry.waiting import WaitPolicy
from chandlery.server import monitoring
from chandlery.server.monitoring import Watchers
from chandlery.server.parts import Parts, access_control, certificate, name_prefixes, open_images, open_parts
from chandlery.server.readiness import Readiness
from chandlery.server.request_log import RequestLog
from chandlery.server.tls import CertificateWatch
from chandlery.server.worker_reports import WorkerReports
from chandlery.settings.settings import Settings
from chandlery.sources.configured import ConfiguredSource
from chandlery.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from chandlery.server.tracing import Traces

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Seconds; granian gives up on workers that live for less than 5.5.
_AGAIN_IN = 10.0

# Revisions of the source at which images were made, and which it should keep.
_KEPT_REVISIONS = 12


def create_app(
    settings: Settings, shared: Path | None = None, popularity: Popularity | None = None
) -> Starlette:
    """Make the application; its lifespan opens the parts, and stops what still runs in the end.

    `shared` is a folder for the workers of one server alone, if it has several, and `popularity` is the table
    that all of them plan with.
    """
    metrics = Metrics()
    proxies = parse_networks(settings.trusted_proxies)
    middleware = [Middleware(RequestLog, metrics=metrics, trusted_proxies=proxies)]
    traces = _traces(settings)
    if traces:
        middleware.append(traces.middleware)
    middleware.append(Middleware(ResponseCache))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            async with _dying_slowly():
                parts = await stack.enter_async_context(open_parts(settings, popularity))
                control = access_control(settings, shared)
                if traces:
                    stack.push_async_callback(asyncio.to_thread, traces.close)
                images = open_images(
                    settings, parts, control=control, metrics=metrics, workers=settings.workers
                )
                reports = None
                if shared:
                    reports = WorkerReports(shared, lambda: monitoring.report(metrics, images.queue))
                    stack.callback(reports.publish)
                await stack.enter_async_context(images)
                if traces:
                    images.queue.observers.append(traces.built)
                access = Access(WaitPolicy(settings.hold, settings.redirections), control)
                blobs = await stack.enter_async_context(maintained(settings, parts.stores, images))
                monitoring.count(metrics, images.queue, settings.data_dir)
                watchers = Watchers(parse_networks(settings.metrics_networks), proxies)
                app.router.routes += [
                    *api.routes(images, blobs, name_prefixes(settings), access),
                    *monitoring.routes(metrics, _readiness(parts), images.queue, watchers, reports),
                ]
                await stack.enter_async_context(in_background(lambda: _keep(parts)))
                works: list[Work] = [lambda: _refresh(parts)]
                copy = certificate(settings)
                watch = CertificateWatch(copy, settings.tls_refresh) if copy else None
                if watch:
                    works.append(watch.run)
                _stop_at_sigterm(images.queue, watch)
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
            "storage": parts.stores.blobs.check,
            "nix": parts.check_nix,
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
        revisions = await parts.stores.index.revisions(_KEPT_REVISIONS)
        for each in parts.sources:
            each.source.keep(revisions)
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
        except (ChandleryError, OSError) as error:
            log.warning("the package source can't be refreshed", source=source.text, error=str(error))
        await asyncio.sleep(min(configured.pin_lifetime, 60.0))
