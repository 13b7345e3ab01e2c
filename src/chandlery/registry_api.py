"""The OCI distribution API at /v2: parse the request, nothing else.

Images come from an `ImageSource`, blobs from a `BlobStore`. Every answer under /v2 that is no success has an
OCI error body; `_ANSWERS` is the only place where errors meet status codes. Which status each error has, and
what clients print then, is told in docs/decisions/0001-status-of-failed-pulls.md.
"""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Protocol
from urllib.parse import urlencode

import msgspec
import structlog
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from chandlery import byte_range, image_name
from chandlery.blob_store import BlobStore
from chandlery.byte_range import ByteRange, Multipart, UnsatisfiableRangeError
from chandlery.client_address import Network, client_address
from chandlery.digest import Digest
from chandlery.errors import (
    BlobNotFoundError,
    BuildError,
    BuildPendingError,
    BuildTooLargeError,
    ChandleryError,
    EvaluationError,
    InvalidDigestError,
    InvalidNameError,
    InvalidReferenceError,
    InvalidSourceError,
    NotFoundError,
    ReferenceNotFoundError,
    TryAgainError,
    UnsupportedEntryError,
)
from chandlery.image_name import ImageRequest
from chandlery.oci import (
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    BuiltImage,
    Descriptor,
    ManifestFormat,
    Platform,
    canonical_json,
)
from chandlery.waiting import WaitPolicy

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# The status and the code of an error is that of the nearest class up its tree.
_ANSWERS: Mapping[type[ChandleryError], tuple[int, str]] = {
    InvalidNameError: (400, "NAME_INVALID"),
    InvalidDigestError: (400, "DIGEST_INVALID"),
    # Nothing can have such a tag; distribution-spec's conformance tests ask for one to see a 404.
    InvalidReferenceError: (404, "MANIFEST_UNKNOWN"),
    NotFoundError: (404, "MANIFEST_UNKNOWN"),
    BlobNotFoundError: (404, "BLOB_UNKNOWN"),
    # Asking again gives the same: with this code podman doesn't.
    BuildError: (422, "MANIFEST_UNKNOWN"),
    EvaluationError: (422, "MANIFEST_UNKNOWN"),
    BuildTooLargeError: (422, "MANIFEST_UNKNOWN"),
    InvalidSourceError: (422, "MANIFEST_UNKNOWN"),
    UnsupportedEntryError: (422, "MANIFEST_UNKNOWN"),
    TryAgainError: (429, "TOOMANYREQUESTS"),
    # What the image depends on failed, here and now: no source, no space, no Nix. No client prints a 5xx.
    ChandleryError: (424, "UNAVAILABLE"),
}

# distribution-spec, "Pushing manifests": larger ones need not be taken.
_LARGEST_MANIFEST = 4 << 20
_MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX})

_BLOB_TYPE = "application/octet-stream"
_FOR_EVER = "public, max-age=31536000, immutable"
_READ_ONLY = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class Access:
    """How clients wait, and which proxies may say who a client is."""

    wait: WaitPolicy = field(default_factory=WaitPolicy)
    trusted_proxies: tuple[Network, ...] = ()


_DEFAULT_ACCESS = Access()


class ImageSource(Protocol):
    """Where images come from; every method may raise any `ChandleryError`."""

    async def image(self, request: ImageRequest, client: str, timeout: float) -> BuiltImage:
        """Give the image of a tag, building it if need be; its blobs and manifests are in the blob store.

        `client` is who asks, for fairness. After `timeout` seconds `BuildPendingError` is raised, and the
        build goes on. Cancelling the call must not stop a build that somebody else waits for.
        """
        ...

    async def tags(self, request: ImageRequest) -> Sequence[str]:
        """Give the tags of an image, in any order; the request's reference means nothing here."""
        ...


class _RefusedError(Exception):
    """An answer that is no success and comes from the request itself."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


class _ManifestKind(msgspec.Struct, rename="camel"):
    """What tells a manifest from any other blob."""

    schema_version: int
    media_type: str


class _RestConvertor(Convertor[str]):
    """Any text in a path; Starlette's own `path` stops at a line break."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("rest", _RestConvertor())


def routes(
    images: ImageSource, blobs: BlobStore, host: Platform, access: Access = _DEFAULT_ACCESS
) -> list[Route]:
    """Give the routes of /v2; `host` is the platform of image names that choose none."""
    api = _RegistryAPI(images, blobs, host, access)
    # A name may hold "manifests" or "blobs" as well: {name:rest} takes as much as it can, so the rightmost
    # counts.
    return [
        Route("/v2", _Endpoint(api.base)),
        Route("/v2/", _Endpoint(api.base)),
        Route("/v2/{name:rest}/manifests/{reference}", _Endpoint(api.manifest)),
        Route("/v2/{name:rest}/blobs/{digest}", _Endpoint(api.blob)),
        Route("/v2/{name:rest}/tags/list", _Endpoint(api.tags)),
        Route("/v2/{name:rest}/referrers/{digest}", _Endpoint(api.referrers)),
        Route("/v2/{name:rest}/blobs/uploads/{session:rest}", _Endpoint(api.unknown, methods=())),
        Route("/v2/_catalog", _Endpoint(api.catalog)),
        Route("/v2/{rest:rest}", _Endpoint(api.unknown)),
    ]


class _Endpoint:
    """An ASGI application around one handler: the methods it allows, and its errors as OCI error bodies."""

    def __init__(
        self, handler: Callable[[Request], Awaitable[Response]], methods: Sequence[str] = _READ_ONLY
    ) -> None:
        self._handler = handler
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = await self._respond(request)
        response.headers["docker-distribution-api-version"] = "registry/2.0"
        if request.method == "HEAD":
            response.body = b""  # its headers, Content-Length too, stay those of GET
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        where = {
            "path": request.scope["path"],
            "request_id": getattr(request.state, "request_id", None),
        }
        try:
            if request.method not in self._methods:
                raise _RefusedError(
                    405,
                    "UNSUPPORTED",
                    "images are built when they are pulled: nothing can be pushed or deleted",
                    {"allow": ", ".join(self._methods)},
                )
            return await self._handler(request)
        except _RefusedError as refused:
            return _error_response(refused.status, refused.code, str(refused), {}, refused.headers)
        except ChandleryError as error:
            status, code = next(_ANSWERS[kind] for kind in type(error).__mro__ if kind in _ANSWERS)
            log.warning("request refused", **where, status=status, code=code, reason=str(error))
            return _error_response(status, code, str(error), vars(error), _retry_headers(error))
        except Exception:
            log.exception("request failed", **where)
            return _error_response(500, "UNKNOWN", "the server failed: its log says why", where)


class _RegistryAPI:
    """The handlers, in the order of distribution-spec's table of endpoints."""

    def __init__(self, images: ImageSource, blobs: BlobStore, host: Platform, access: Access) -> None:
        self._images = images
        self._blobs = blobs
        self._host = host
        self._access = access

    async def base(self, _: Request) -> Response:
        """Say that this is a registry (end-1)."""
        return Response(b"{}", media_type="application/json")

    async def blob(self, request: Request) -> Response:
        """Give a blob or ranges of it (end-2)."""
        self._image_request(request)
        digest = Digest.parse(request.path_params["digest"])
        info = await self._blobs.stat(digest)
        if info is None:
            raise BlobNotFoundError(str(digest))
        headers = {**_digest_headers(digest), "cache-control": _FOR_EVER, "accept-ranges": "bytes"}
        if _is_known(request, digest):
            return Response(status_code=304, headers=headers)
        ranges = _ranges(request, digest, info.size)
        if ranges:
            return self._partial_blob(digest, info.size, ranges, headers)
        headers["content-length"] = str(info.size)
        if request.method == "HEAD":
            return Response(headers=headers, media_type=_BLOB_TYPE)
        path = self._blobs.path(digest)
        if path is None:
            return StreamingResponse(self._blobs.read(digest), headers=headers, media_type=_BLOB_TYPE)
        # FileResponse lets the server send the file. What Range says has been decided above, by the digest.
        request.scope["headers"] = [item for item in request.scope["headers"] if item[0] != b"range"]
        return FileResponse(path, headers=headers, media_type=_BLOB_TYPE)

    async def manifest(self, request: Request) -> Response:
        """Give a manifest (end-3): a tag's is built now if need be, a digest's must be there."""
        reference = request.path_params["reference"]
        if image_name.is_digest(reference):
            digest = Digest.parse(reference)
            self._image_request(request)
            descriptor, content = await self._manifest_by_digest(request.path_params["name"], digest)
            headers = {"cache-control": _FOR_EVER}
        else:
            wanted = self._image_request(request, reference)
            try:
                image = await self._images.image(wanted, self._client(request), self._access.wait.hold)
            except BuildPendingError as pending:
                return self._keep_waiting(request, pending)
            descriptor = image.manifests[accepted_format(request.headers.getlist("accept"))]
            content = await self._read(descriptor.digest)
            # What a tag names may change, and depends on Accept: ask again each time, and get a 304.
            headers = {"cache-control": "no-cache", "vary": "Accept"}
        headers |= _digest_headers(descriptor.digest)
        if _is_known(request, descriptor.digest):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=descriptor.media_type)

    def _keep_waiting(self, request: Request, pending: BuildPendingError) -> Response:
        """Send a request on to itself, so that its client goes on waiting, or say that it waited enough."""
        location = self._access.wait.next_location(request.scope["path"], request.url.query)
        if location is None:
            raise pending
        return _error_response(307, "TOOMANYREQUESTS", str(pending), vars(pending), {"location": location})

    def _client(self, request: Request) -> str:
        peer = request.client.host if request.client else ""
        return client_address(peer, request.headers.getlist("x-forwarded-for"), self._access.trusted_proxies)

    async def tags(self, request: Request) -> Response:
        """List tags (end-8a and end-8b)."""
        known = await self._images.tags(self._image_request(request))
        name = request.path_params["name"]
        tags, more = _page(known, request.query_params.get("n"), request.query_params.get("last"))
        headers = {"cache-control": "no-cache"}
        if more:
            query = urlencode({"n": len(tags), "last": tags[-1]})
            headers["link"] = f'</v2/{name}/tags/list?{query}>; rel="next"'
        body = canonical_json({"name": name, "tags": tags})
        return Response(body, headers=headers, media_type="application/json")

    async def referrers(self, request: Request) -> Response:
        """List what refers to a manifest (end-12a): nothing does, since nothing is pushed."""
        self._image_request(request)
        Digest.parse(request.path_params["digest"])
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        return Response(canonical_json(index), media_type=OCI_INDEX)

    async def catalog(self, _: Request) -> Response:
        """Refuse Docker's list of all names, which isn't in distribution-spec."""
        raise _RefusedError(404, "UNSUPPORTED", "there is no list: every mix of packages is a name")

    async def unknown(self, request: Request) -> Response:
        """Refuse every other path."""
        raise _RefusedError(404, "UNSUPPORTED", f"{request.scope['path']} is not in the distribution API")

    def _image_request(self, request: Request, reference: str = image_name.LATEST) -> ImageRequest:
        return image_name.parse(request.path_params["name"], reference, self._host)

    async def _manifest_by_digest(self, name: str, digest: Digest) -> tuple[Descriptor, bytes]:
        """Read a manifest, and be sure that it is one: the blob store also holds layers and configs."""
        info = await self._blobs.stat(digest)
        if info is not None and info.size <= _LARGEST_MANIFEST:
            content = await self._read(digest)
            try:
                media_type = msgspec.json.decode(content, type=_ManifestKind).media_type
            except (msgspec.DecodeError, UnicodeDecodeError):
                media_type = ""
            if media_type in _MANIFEST_TYPES:
                return Descriptor(media_type, digest, len(content)), content
        raise ReferenceNotFoundError(name, str(digest), "pull a tag of this image, which builds it")

    async def _read(self, digest: Digest) -> bytes:
        return b"".join([part async for part in self._blobs.read(digest)])

    def _partial_blob(
        self, digest: Digest, size: int, ranges: Sequence[ByteRange], headers: Mapping[str, str]
    ) -> Response:
        if len(ranges) == 1:
            body = self._blobs.read(digest, ranges[0])
            length, media_type = ranges[0].size, _BLOB_TYPE
            headers = {**headers, "content-range": ranges[0].content_range(size)}
        else:
            multipart = Multipart(ranges, size, _BLOB_TYPE, boundary=token_hex(16))
            body = self._multipart(digest, multipart)
            length, media_type = multipart.content_length, multipart.media_type
        return StreamingResponse(body, 206, {**headers, "content-length": str(length)}, media_type)

    async def _multipart(self, digest: Digest, multipart: Multipart) -> AsyncIterator[bytes]:
        for part in multipart.ranges:
            yield multipart.head(part)
            async for block in self._blobs.read(digest, part):
                yield block
        yield multipart.end


def accepted_format(accept: Iterable[str]) -> ManifestFormat:
    """Choose from what a client's Accept headers say (RFC 9110, section 12.5.1); OCI unless Docker is better.

    A client that lists neither gets OCI, so that every pull works.
    """
    quality: dict[str, float] = {}
    for item in ",".join(accept).split(","):
        media_range, *parameters = (text.strip().lower() for text in item.split(";"))
        weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        quality[media_range] = float(weight) if re.fullmatch(r"[01](\.[0-9]{0,3})?", weight) else 0.0

    def of(media_type: str) -> float:
        nearest_first = (media_type, "application/*", "*/*")
        return next((quality[item] for item in nearest_first if item in quality), 0.0)

    return ManifestFormat.DOCKER if of(DOCKER_MANIFEST) > of(OCI_MANIFEST) else ManifestFormat.OCI


def _page(tags: Iterable[str], n: str | None, last: str | None) -> tuple[list[str], bool]:
    """Give the tags after `last`, at most `n` of them, and whether more follow."""

    # "The tags MUST be in lexical order (i.e. case-insensitive alphanumeric order)" (distribution-spec).
    def order(tag: str) -> tuple[str, str]:
        return tag.lower(), tag

    after = sorted((tag for tag in set(tags) if last is None or order(tag) > order(last)), key=order)
    if n is None:
        return after, False
    if re.fullmatch(r"[0-9]{1,18}", n) is None:
        raise _RefusedError(400, "PAGINATION_NUMBER_INVALID", f"n is {n[:20]!r}: expected a number of tags")
    # "If <int> is zero, ... the registry MUST NOT include a Link header" (distribution-spec).
    return after[: int(n)], 0 < int(n) < len(after)


def _ranges(request: Request, digest: Digest, size: int) -> Sequence[ByteRange]:
    """Give the ranges of a blob that the request is for; none means all of it."""
    header = request.headers.get("range")
    # Range means something with GET only (RFC 9110, section 14.2).
    if header is None or request.method != "GET":
        return ()
    if request.headers.get("if-range", _etag(digest)) != _etag(digest):
        return ()
    try:
        return byte_range.parse(header, size)
    except UnsatisfiableRangeError as error:
        raise _RefusedError(
            416, "RANGE_INVALID", str(error), {"content-range": f"bytes */{error.size}"}
        ) from error


def _etag(digest: Digest) -> str:
    return f'"{digest}"'


def _digest_headers(digest: Digest) -> dict[str, str]:
    return {"docker-content-digest": str(digest), "etag": _etag(digest)}


def _is_known(request: Request, digest: Digest) -> bool:
    """Tell whether If-None-Match names the content (RFC 9110, section 13.1.2)."""
    listed = ",".join(request.headers.getlist("if-none-match")).split(",")
    return any(tag.strip().removeprefix("W/") in ("*", _etag(digest)) for tag in listed)


def _retry_headers(error: ChandleryError) -> Mapping[str, str]:
    return {"retry-after": str(error.retry_after)} if isinstance(error, TryAgainError) else {}


def _error_response(
    status: int, code: str, message: str, detail: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    """Give an OCI error body (distribution-spec, "Error Codes"); the detail is the data of the error."""
    errors = [{"code": code, "message": message, "detail": dict(detail)}]
    # json, not msgspec: names and logs may hold bytes that are no UTF-8, and this must never fail.
    body = json.dumps({"errors": errors}, default=str)
    all_headers = {"cache-control": "no-store", **(headers or {})}
    return Response(body, status, all_headers, "application/json")
