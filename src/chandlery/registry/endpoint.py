"""One endpoint of the distribution API: which methods it has, and what went wrong as an OCI error body.

`ANSWERS` is the only place where errors meet status codes. Which status each has, and what clients print
then, is told in docs/decisions/0001-status-of-failed-pulls.md.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chandlery.access.control import AccessControl
from chandlery.errors import (
    BlobNotFoundError,
    BrokenError,
    BuildError,
    BuildTooLargeError,
    ChandleryError,
    CredentialsError,
    EvaluationError,
    EvaluationFailedError,
    EvaluationMemoryError,
    EvaluationTimeoutError,
    InfiniteRecursionError,
    InsecureError,
    InvalidDigestError,
    InvalidNameError,
    InvalidReferenceError,
    InvalidSourceError,
    NotAPackageError,
    NotFoundError,
    PullDeniedError,
    TryAgainError,
    UnfreeError,
    UnsupportedEntryError,
    UnsupportedSystemError,
)
from chandlery.registry import response_cache

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# The status and the code of an error is that of the nearest class up its tree.
ANSWERS: Mapping[type[ChandleryError], tuple[int, str]] = {
    InvalidNameError: (400, "NAME_INVALID"),
    InvalidDigestError: (400, "DIGEST_INVALID"),
    # Nothing can have such a tag; distribution-spec's conformance tests ask for one to see a 404.
    InvalidReferenceError: (404, "MANIFEST_UNKNOWN"),
    NotFoundError: (404, "MANIFEST_UNKNOWN"),
    BlobNotFoundError: (404, "BLOB_UNKNOWN"),
    # Asking again gives the same: with this code podman doesn't.
    BuildError: (422, "MANIFEST_UNKNOWN"),
    EvaluationError: (422, "MANIFEST_UNKNOWN"),
    UnfreeError: (422, "MANIFEST_UNKNOWN"),
    BrokenError: (422, "MANIFEST_UNKNOWN"),
    InsecureError: (422, "MANIFEST_UNKNOWN"),
    UnsupportedSystemError: (422, "MANIFEST_UNKNOWN"),
    NotAPackageError: (422, "MANIFEST_UNKNOWN"),
    EvaluationFailedError: (422, "MANIFEST_UNKNOWN"),
    InfiniteRecursionError: (422, "MANIFEST_UNKNOWN"),
    # These too: what loops once loops again, and podman would have it evaluated four times.
    EvaluationTimeoutError: (422, "MANIFEST_UNKNOWN"),
    EvaluationMemoryError: (422, "MANIFEST_UNKNOWN"),
    BuildTooLargeError: (422, "MANIFEST_UNKNOWN"),
    InvalidSourceError: (422, "MANIFEST_UNKNOWN"),
    UnsupportedEntryError: (422, "MANIFEST_UNKNOWN"),
    TryAgainError: (429, "TOOMANYREQUESTS"),
    # Clients log in then, and nothing else may make them.
    CredentialsError: (401, "UNAUTHORIZED"),
    PullDeniedError: (403, "DENIED"),
    # What the image depends on failed, here and now: no source, no space, no Nix. No client prints a 5xx, and
    # distribution-spec's codes have no nearer one.
    ChandleryError: (424, "UNSUPPORTED"),
}

_READ_ONLY = ("GET", "HEAD")


class RefusedError(Exception):
    """An answer that is no success and comes from the request itself."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


class Endpoint:
    """An ASGI application around one handler: the methods it allows, and its errors as OCI error bodies."""

    def __init__(
        self,
        control: AccessControl | None,
        handler: Callable[[Request], Awaitable[Response]],
        methods: Sequence[str] = _READ_ONLY,
    ) -> None:
        self._control = control
        self._handler = handler
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever goes wrong."""
        request = Request(scope, receive)
        response = await self._respond(request)
        response.headers["docker-distribution-api-version"] = "registry/2.0"
        if request.method == "HEAD":
            response.body = b""  # its headers, Content-Length too, stay those of GET
        response_cache.keep(scope, response)
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        where = {
            "path": request.scope["path"],
            "request_id": getattr(request.state, "request_id", None),
        }
        try:
            if request.method not in self._methods:
                raise RefusedError(
                    405,
                    "UNSUPPORTED",
                    "images are built when they are pulled: nothing can be pushed or deleted",
                    {"allow": ", ".join(self._methods)},
                )
            return await self._handler(request)
        except RefusedError as refused:
            return error_response(request, refused.status, refused.code, str(refused), {}, refused.headers)
        except CredentialsError as error:
            # Every pull begins so: no reason for a warning.
            headers = {"www-authenticate": self._control.challenge(request, error)} if self._control else {}
            return error_response(request, *ANSWERS[CredentialsError], str(error), vars(error), headers)
        except ChandleryError as error:
            status, code = next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)
            log.warning("request refused", **where, status=status, code=code, reason=str(error))
            return error_response(request, status, code, str(error), vars(error), _retry_headers(error))
        except Exception:
            log.exception("request failed", **where)
            return error_response(request, 500, "UNKNOWN", "the server failed: its log says why", {})


def _retry_headers(error: ChandleryError) -> Mapping[str, str]:
    return {"retry-after": str(error.retry_after)} if isinstance(error, TryAgainError) else {}


def error_response(
    request: Request,
    status: int,
    code: str,
    message: str,
    detail: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an OCI error body (distribution-spec, "Error Codes").

    The detail is the data of the error, as far as it says something, and the id by which the request is found
    in the log.
    """
    request_id = getattr(request.state, "request_id", None)
    known_by = {"request_id": request_id} if request_id else {}
    said = {name: value for name, value in detail.items() if value != ""}
    errors = [{"code": code, "message": message, "detail": {**said, **known_by}}]
    # json, not msgspec: names and logs may hold bytes that are no UTF-8, and this must never fail.
    body = json.dumps({"errors": errors}, default=str)
    all_headers = {"cache-control": "no-store", **(headers or {})}
    return Response(body, status, all_headers, "application/json")
