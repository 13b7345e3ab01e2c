"""One log event for every request, an id that finds it, and who its client is.

Whatever else is logged while the request is handled has the id, and so has what a build logs that it started.

A plain ASGI middleware: it passes every message on, with the id in the headers, so that the server can still
send files itself (`http.response.pathsend`). It is on the way of every request, so it does little.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from secrets import token_hex

import structlog
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chandlery.access import client_address
from chandlery.access.client_address import FORWARDED_FOR, Network, client_network, is_trusted, peer_of
from chandlery.machine.token_buckets import TokenBuckets
from chandlery.telemetry.metrics import Metrics

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_ID = re.compile(r"[0-9A-Za-z._-]{1,64}")
_ID_HEADER = b"x-request-id"
_LENGTH_HEADER = b"content-length"

# In an hour.
_PROXIES_TOLD = 10
_ALL = "all"


@dataclass(slots=True)
class _Sent:
    """What has gone out: the status, None before there is one, and the bytes of the body."""

    status: int | None = None
    announced: int = 0
    counted: int = 0


class RequestLog:
    """Log method, path, status, duration in milliseconds, and bytes of the body; count them in `metrics`.

    `trusted_proxies` may say who a client is, and give a request its id, by X-Request-Id; an id goes into the
    response's. That others say who a client is is logged now and then: one of them may be the server's proxy.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics | None = None,
        trusted_proxies: Sequence[Network] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._trusted_proxies = trusted_proxies
        self._metrics = metrics or Metrics()
        self._told = TokenBuckets(3600.0, clock=clock)
        # Bound once: the logger of a module is made anew for every event.
        self._log = log.bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; what it logs itself can have the id from `request.state.request_id`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        client_address.note(scope, self._trusted_proxies)
        self._tell_of_unknown_proxy(scope)
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

    def _id(self, scope: Scope) -> str:
        """Return the id that a trusted proxy has given a request, if it is one, or a new one."""
        for name, value in scope["headers"]:
            if name == _ID_HEADER:
                given: str = value.decode("latin-1")
                if _ID.fullmatch(given) and is_trusted(peer_of(scope), self._trusted_proxies):
                    return given
                break
        return token_hex(8)

    def _tell_of_unknown_proxy(self, scope: Scope) -> None:
        """Log that somebody who isn't trusted says who its client is: each once an hour, and ten in all."""
        if all(name != FORWARDED_FOR for name, _ in scope["headers"]):
            return
        peer = peer_of(scope)
        if is_trusted(peer, self._trusted_proxies):
            return
        if not self._told.take(client_network(peer), 1) and not self._told.take(_ALL, _PROXIES_TOLD):
            self._log.warning(
                "X-Forwarded-For is ignored: who sends it is not in trusted_proxies, which a proxy has to be",
                sender=peer,
            )


def route_of(scope: Scope) -> str:
    """Return the name of the route that a request has taken; `other` if there is none for it."""
    route = scope.get("route")
    return route.name if isinstance(route, Route) else "other"
