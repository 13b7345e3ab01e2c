"""One log event for every request, and an id that finds it.

Whatever else is logged while the request is handled has the id, and so has what a build logs that it started.

A plain ASGI middleware: it passes every message on as it is, so that the server can still send files itself
(`http.response.pathsend`).
"""

import re
import time
from dataclasses import dataclass
from secrets import token_hex

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chandlery.metrics import Metrics

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_ID = re.compile(r"[0-9A-Za-z._-]{1,64}")


@dataclass(slots=True)
class _Sent:
    """What has gone out: the status, None before there is one, and the bytes of the body."""

    status: int | None = None
    announced: int = 0
    counted: int = 0


class RequestLog:
    """Log method, path, status, duration in milliseconds, and bytes of the body; count them in `metrics`.

    The id comes from the request's X-Request-Id, if a proxy has given it one, and goes into the response's.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics | None = None) -> None:
        self._app = app
        self._metrics = metrics or Metrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; what it logs itself can have the id from `request.state.request_id`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        sent = _Sent()

        async def send_counted(message: Message) -> None:
            match message["type"]:
                case "http.response.start":
                    headers = MutableHeaders(scope=message)
                    headers["x-request-id"] = request_id
                    sent.status = message["status"]
                    sent.announced = int(headers.get("content-length", 0))
                case "http.response.body":
                    sent.counted += len(message.get("body", b""))
                case "http.response.pathsend":
                    sent.counted = sent.announced
            await send(message)

        try:
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                await self._app(scope, receive, send_counted)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.answered(route_of(scope), scope["method"], sent.status, seconds, sent.counted)
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=sent.status,
                duration_ms=round(seconds * 1000, 1),
                bytes=sent.counted,
                request_id=request_id,
            )


def route_of(scope: Scope) -> str:
    """Give the name of the route that a request has taken; `other` if there is none for it."""
    route = scope.get("route")
    return route.name if isinstance(route, Route) else "other"
