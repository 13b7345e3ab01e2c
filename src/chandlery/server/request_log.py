"""One log event for every request, an id that finds it, and who its client is.

Whatever else is logged while the request is handled has the id, and so has what a build logs that it started.

A plain ASGI middleware: it passes every message on, with the id in the headers, so that the server can still
send files itself (`http.response.pathsend`). It is on the way of every request, so it does little.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_hex

import structlog
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chandlery.access import client_address
from chandlery.access.client_address import Network
from chandlery.telemetry.metrics import Metrics

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_ID = re.compile(r"[0-9A-Za-z._-]{1,64}")
_ID_HEADER = b"x-request-id"
_LENGTH_HEADER = b"content-length"


@dataclass(slots=True)
class _Sent:
    """What has gone out: the status, None before there is one, and the bytes of the body."""

    status: int | None = None
    announced: int = 0
    counted: int = 0


class RequestLog:
    """Log method, path, status, duration in milliseconds, and bytes of the body; count them in `metrics`.

    The id comes from the request's X-Request-Id, if a proxy has given it one, and goes into the response's.
    `trusted_proxies` may say who a client is.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics | None = None, trusted_proxies: Sequence[Network] = ()
    ) -> None:
        self._app = app
        self._trusted_proxies = trusted_proxies
        self._metrics = metrics or Metrics()
        # Bound once: the logger of a module is made anew for every event.
        self._log = log.bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; what it logs itself can have the id from `request.state.request_id`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        client_address.note(scope, self._trusted_proxies)
        started = time.perf_counter()
        sent = _Sent()

        async def send_counted(message: Message) -> None:
            kind = message["type"]
            if kind == "http.response.start":
                sent.status = message["status"]
                headers = message["headers"]
                sent.announced = next((int(value) for name, value in headers if name == _LENGTH_HEADER), 0)
                # Not into the list: it may be that of other responses, too.
                message = {**message, "headers": [*headers, (_ID_HEADER, request_id.encode())]}
            elif kind == "http.response.body":
                sent.counted += len(message.get("body", b""))
            elif kind == "http.response.pathsend":
                sent.counted = sent.announced
            await send(message)

        bound = structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, receive, send_counted)
        finally:
            structlog.contextvars.reset_contextvars(**bound)
            seconds = time.perf_counter() - started
            self._metrics.answered(route_of(scope), scope["method"], sent.status, seconds, sent.counted)
            self._log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=sent.status,
                duration_ms=round(seconds * 1000, 1),
                bytes=sent.counted,
                request_id=request_id,
            )


def _id(scope: Scope) -> str:
    """Return the id that a request has come with, if it is one, or a new one."""
    for name, value in scope["headers"]:
        if name == _ID_HEADER:
            given: str = value.decode("latin-1")
            if _ID.fullmatch(given):
                return given
            break
    return token_hex(8)


def route_of(scope: Scope) -> str:
    """Return the name of the route that a request has taken; `other` if there is none for it."""
    route = scope.get("route")
    return route.name if isinstance(route, Route) else "other"
