"""Answers that were given a moment ago and still hold, given again without finding out how they come about.

A handler says of a response that it is a `CachedResponse`: whoever sends the same request gets it as long as
its `check` says so. The same request has the same method, path and query and the same Accept headers, and
none of those that ask for less, or are for this client alone. Who may ask is not looked at here: a handler
that looks at it returns no cached responses.

Nothing is served that is older than it would be otherwise. A check begins after the request has come; but one
check is for all requests that have come before it, so it costs little however long it takes. What need not be
so exact has a `lifetime`, for which a check isn't repeated.

A plain ASGI middleware, which stands inside of those that log and trace requests: they see no difference.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from cachetools import LRUCache
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chandlery.errors import ChandleryError

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Bytes, of headers and bodies.
_MOST = 32 << 20
# About what an answer takes beside its body and what distinguishes its request.
_OVERHEAD = 2048

# Seconds. A handler has all the time that a client waits, and a check delays it.
_LONGEST_CHECK = 1.0

_METHODS = ("GET", "HEAD")
# With these a request isn't like others.
_PERSONAL = frozenset(
    {
        *(b"authorization", b"cookie", b"range", b"if-range"),
        *(b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since"),
    }
)

# The name under which `keep` finds a place in the scope of a request.
_PLACE = "chandlery.response_cache"

_Key = tuple[str, str, bytes, tuple[bytes, ...]]


class CachedResponse(Response):
    """A response for everybody who asks the same, as long as `check` gives True.

    For `lifetime` seconds after a check that is taken for granted. A `ChandleryError` of `check` means False.
    """

    def __init__(
        self,
        content: bytes,
        headers: Mapping[str, str],
        media_type: str,
        check: Callable[[], Awaitable[bool]],
        lifetime: float = 0.0,
    ) -> None:
        super().__init__(content, headers=headers, media_type=media_type)
        self.check = check
        self.lifetime = lifetime


@dataclass(slots=True, eq=False)
class _Answer:
    start: Message
    body: Message
    route: Any
    check: Callable[[], Awaitable[bool]]
    lifetime: float
    holds_until: float
    size: int
    waiting: list["asyncio.Future[bool]"] = field(default_factory=list)
    checking: "asyncio.Task[None] | None" = None


class ResponseCache:
    """Sends cached responses of `app` again; those that were sent last take at most `most` bytes."""

    def __init__(self, app: ASGIApp, most: int = _MOST) -> None:
        self._app = app
        self._answers: LRUCache[_Key, _Answer] = LRUCache(most, getsizeof=lambda answer: answer.size)

    @property
    def size(self) -> int:
        """The bytes that answers take."""
        return int(self._answers.currsize)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request from memory, or let the application do it."""
        key = _key(scope) if scope["type"] == "http" else None
        if key is not None:
            answer = self._answers.get(key)
            if answer is not None and (time.monotonic() < answer.holds_until or await _holds(answer)):
                scope["route"] = answer.route
                await send(answer.start)
                await send(answer.body)
                return
            scope[_PLACE] = self._answers, key
        await self._app(scope, receive, send)


def keep(scope: Scope, response: Response) -> None:
    """Keep the response to a request, if it is to be cached, as it is going to be sent."""
    if not isinstance(response, CachedResponse) or _PLACE not in scope:
        return
    answers, key = scope[_PLACE]
    headers = tuple(response.raw_headers)
    start = {"type": "http.response.start", "status": response.status_code, "headers": headers}
    body = {"type": "http.response.body", "body": response.body}
    _, path, query, accept = key
    answer = _Answer(
        *(start, body, scope.get("route"), response.check, response.lifetime),
        holds_until=time.monotonic() + response.lifetime,
        size=_OVERHEAD + len(response.body) + len(path) + len(query) + sum(map(len, accept)),
    )
    if answer.size <= answers.maxsize:
        answers[key] = answer
    else:
        answers.pop(key, None)


def _key(scope: Scope) -> _Key | None:
    """Return what distinguishes a request; None if nobody else gets what it gets."""
    method = scope["method"]
    if method not in _METHODS:
        return None
    accept = []
    for name, value in scope["headers"]:
        if name == b"accept":
            accept.append(value)
        elif name in _PERSONAL:
            return None
    return method, scope["path"], scope.get("query_string", b""), tuple(accept)


async def _holds(answer: _Answer) -> bool:
    """Return whether an answer holds, by a check that begins after this was called."""
    waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    answer.waiting.append(waiter)
    if answer.checking is None:
        answer.checking = asyncio.create_task(_check(answer))
    return await waiter


async def _check(answer: _Answer) -> None:
    """Check an answer until nobody waits for that any more."""
    try:
        while answer.waiting:
            waiting, answer.waiting = answer.waiting, []
            began, holds = time.monotonic(), False
            try:
                async with asyncio.timeout(_LONGEST_CHECK):
                    holds = await answer.check()
            except (ChandleryError, TimeoutError):
                pass  # the handler finds out why
            except Exception:
                log.exception("an answer can't be checked")
            finally:
                _tell(waiting, holds)
            if holds:
                answer.holds_until = began + answer.lifetime
    finally:
        answer.checking = None
        _tell(answer.waiting, holds=False)


def _tell(waiting: Iterable["asyncio.Future[bool]"], holds: bool) -> None:
    for waiter in waiting:
        if not waiter.done():  # as it is if whoever waited was cancelled
            waiter.set_result(holds)
