"""Watching a server: is it alive and ready, what does it count, what does it build.

    /healthz            200 as long as the process answers
    /readyz             200 when images can be built and served, else 503; with each check's result
    /metrics            figures for Prometheus
    /builds             the builds that are known, the newest first
    /builds/<id>        one of them
    /builds/<id>/log    what Nix says in it, as it comes

Balancers and orchestrators ask from anywhere, so everybody may ask the first two; but reasons, which may name
folders and hosts, and all that follows are for the networks in the settings alone.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import disk_usage

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from chandlery.access import client_address
from chandlery.access.client_address import Network, is_loopback, is_trusted
from chandlery.builds.build import Build
from chandlery.builds.build_queue import BuildQueue
from chandlery.errors import ChandleryError
from chandlery.server.readiness import Readiness
from chandlery.server.worker_reports import Report, ReportedBuild, WorkerReports
from chandlery.telemetry.metrics import Metrics

_BUILD_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{8}")
_BLOCK = 1 << 16  # bytes
_LOOK_AGAIN = 0.25  # seconds between looks whether a log has grown
_FRESH = {"cache-control": "no-store"}

# A request that has one of these came through a proxy.
_FORWARDING_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Watchers:
    """Who may look: the addresses in `networks`, also behind the proxies that are trusted."""

    networks: tuple[Network, ...] = ()
    trusted_proxies: tuple[Network, ...] = ()

    def include(self, request: Request) -> bool:
        """Return whether the client is one of them.

        Behind a proxy of this machine that isn't trusted, everybody would look like this machine; so who
        comes through a proxy that doesn't say for whom is nobody. Nor is who asks this machine for another
        host, as through a proxy or a forwarded port that adds no header, or from a page in a browser whose
        name was made to lead here.
        """
        if not _asks_for_itself(request):
            return False
        address = request.client.host if request.client else ""
        if any(name in request.headers for name in _FORWARDING_HEADERS):
            if not is_trusted(address, self.trusted_proxies):
                return False
            address = client_address.noted(request)
            if is_trusted(address, self.trusted_proxies):
                return False
        elif is_loopback(address) and not is_loopback(_host(request.headers.get("host", ""))):
            return False
        return is_trusted(address, self.networks)


def _host(header: str) -> str:
    """Return the host of a Host header, without the port (RFC 9110, section 7.2)."""
    host, _, port = header.rpartition(":")
    return (host if host and port.isdigit() else header).strip("[]")


def _asks_for_itself(request: Request) -> bool:
    """Return whether no page of another origin sent a browser here (Fetch, "Origin" and "Sec-Fetch-Site")."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    return origin is None or origin.partition("://")[2] == request.headers.get("host")


def count(metrics: Metrics, queue: BuildQueue, folder: Path) -> None:
    """Have the builds of a queue counted as they end; the queue and the disk are read when somebody looks."""

    def built(build: Build) -> None:
        steps = [(step, end - begin) for step, begin, end in build.steps]
        works = [(time.work, time.busy) for time in build.timings.times()]
        metrics.built(build.state, build.seconds, steps, works)

    queue.observers.append(built)
    metrics.gauge(
        "chandlery_queued_builds", "Builds that wait for their turn.", lambda: queue.queued, summed=True
    )
    metrics.gauge("chandlery_running_builds", "Builds that run.", lambda: queue.running, summed=True)
    # One call of the system each (statvfs), however full the folder is.
    metrics.gauge(
        "chandlery_disk_used_bytes",
        "Bytes in use on the file system with the data folder.",
        lambda: disk_usage(folder).used,
    )
    metrics.gauge(
        "chandlery_disk_free_bytes",
        "Bytes that are free on the file system with the data folder.",
        lambda: disk_usage(folder).free,
    )


def report(metrics: Metrics, queue: BuildQueue) -> Report:
    """Say what the other workers of a server have to know to answer for this one."""
    return Report(metrics.figures(), [_reported(queue, build) for build in queue.builds()])


def routes(
    metrics: Metrics,
    readiness: Readiness,
    queue: BuildQueue,
    watchers: Watchers,
    reports: WorkerReports | None = None,
) -> list[Route]:
    """Return the routes; `reports` are those of the server's other workers, if it has several."""
    pages = _Pages(metrics, readiness, queue, watchers, reports)
    return [
        Route("/healthz", pages.health),
        Route("/readyz", pages.readiness),
        Route("/metrics", pages.for_watchers(pages.metrics), name="metrics"),
        Route("/builds", pages.for_watchers(pages.builds), name="builds"),
        Route("/builds/{id}", pages.for_watchers(pages.build), name="builds"),
        Route("/builds/{id}/log", pages.for_watchers(pages.log), name="builds"),
    ]


class _Pages:
    def __init__(
        self,
        metrics: Metrics,
        readiness: Readiness,
        queue: BuildQueue,
        watchers: Watchers,
        reports: WorkerReports | None,
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._queue = queue
        self._watchers = watchers
        self._reports = reports

    def for_watchers(self, handler: Handler) -> Handler:
        """Let nobody in but the watchers."""

        async def guarded(request: Request) -> Response:
            if self._watchers.include(request):
                return await handler(request)
            return _refusal(403, "this is for the networks in the setting metrics_networks alone")

        return guarded

    async def health(self, _: Request) -> Response:
        """Say that the process answers."""
        return JSONResponse({"alive": True}, headers=_FRESH)

    async def readiness(self, request: Request) -> Response:
        """Say whether every check is passed, and to watchers why not."""
        problems = await self._readiness.problems()
        told = self._watchers.include(request)
        checks = {
            name: "ok" if problem is None else problem if told else "failed"
            for name, problem in problems.items()
        }
        ready = not any(problems.values())
        return JSONResponse({"ready": ready, "checks": checks}, 200 if ready else 503, _FRESH)

    async def metrics(self, request: Request) -> Response:
        """Return the figures."""
        others = (each.figures for each in self._others())
        content, media_type = self._metrics.exposition(request.headers.get("accept", ""), others)
        return Response(content, headers={**_FRESH, "content-type": media_type})

    async def builds(self, _: Request) -> Response:
        """List the builds that are known, the newest first."""
        builds = sorted(self._builds(), key=lambda build: build.asked_at, reverse=True)
        return JSONResponse([build.description for build in builds], headers=_FRESH)

    async def build(self, request: Request) -> Response:
        """Describe a build."""
        build = self._find(request.path_params["id"])
        return JSONResponse(build.description, headers=_FRESH) if build else _no_such_build()

    async def log(self, request: Request) -> Response:
        """Return a build's log; as long as the build goes on, so does the answer."""
        build_id = request.path_params["id"]
        if _BUILD_ID.fullmatch(build_id) is None:
            return _no_such_build()
        # The logs of builds outlive the process that ran them.
        file = self._queue.log_file(build_id)
        if self._find(build_id) is None and not await anyio.Path(file).exists():
            return _no_such_build()
        if request.method == "HEAD":
            return PlainTextResponse(headers=_FRESH)
        content = _tail(file, lambda: self._has_ended(build_id))
        return StreamingResponse(content, headers=_FRESH, media_type="text/plain")

    def _others(self) -> Iterator[Report]:
        return self._reports.others() if self._reports else iter(())

    def _builds(self) -> Iterator[ReportedBuild]:
        """Yield the builds of all workers."""
        for build in self._queue.builds():
            yield _reported(self._queue, build)
        for each in self._others():
            yield from each.builds

    def _find(self, build_id: str) -> ReportedBuild | None:
        return next((build for build in self._builds() if build.description["id"] == build_id), None)

    def _has_ended(self, build_id: str) -> bool:
        """Return whether nothing more will happen in a build; so it is if it isn't known."""
        own = self._queue.find(build_id)
        if own is not None:
            return own.has_ended
        build = self._find(build_id)
        return build is None or build.has_ended


def _reported(queue: BuildQueue, build: Build) -> ReportedBuild:
    description = {
        "id": build.id,
        "image": build.image,
        "state": build.state,
        "position": queue.position(build),
        "waiters": build.waiters,
        "seconds": round(build.seconds, 3),
        "timeline": [{"step": step, "seconds": seconds} for step, seconds in build.timeline],
        "works": [asdict(work) for work in build.timings.times()],
        "log": f"/builds/{build.id}/log",
    }
    if build.error is not None:
        known = isinstance(build.error, ChandleryError)
        description["error"] = str(build.error) if known else "the server failed: its log says why"
    return ReportedBuild(build.asked_at, build.has_ended, description)


async def _tail(file: Path, has_ended: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Yield what is in a file, and what is added to it until `has_ended`; it may not be there yet."""
    position = 0
    while True:
        # Asked before reading, so that nothing that was written before the end is missed.
        ended = has_ended()
        if await anyio.Path(file).exists():
            async with await anyio.open_file(file, "rb") as log:
                await log.seek(position)
                while block := await log.read(_BLOCK):
                    position += len(block)
                    yield block
        if ended:
            return
        await asyncio.sleep(_LOOK_AGAIN)


def _no_such_build() -> Response:
    return _refusal(404, "no such build is known: /builds lists those that are")


def _refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status, _FRESH)
