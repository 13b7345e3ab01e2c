"""The OCI distribution API at /v2: parse the request, nothing else.

Images come from an `ImageSource`, blobs from `ServedBlobs`. Every answer under /v2 that is no success has an
OCI error body, which `endpoint` makes. Which test shows each requirement of distribution-spec is told in
docs/conformance.md.
"""

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex
from typing import Protocol
from urllib.parse import urlencode

import msgspec
import structlog
from cachetools import LRUCache
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from chandlery.access import client_address
from chandlery.access.client_address import client_network
from chandlery.access.control import TOKEN_PATH, AccessControl
from chandlery.access.rules import EVERYTHING, Permission
from chandlery.builds.images import Pulled
from chandlery.errors import (
    BlobNotFoundError,
    BuildPendingError,
    ReferenceNotFoundError,
)
from chandlery.image import name as image_name
from chandlery.image.name import ImageRequest, NamePrefixes
from chandlery.machine.deadline import Deadline
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    DOCKER_MANIFEST,
    DOCKER_MANIFEST_LIST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    canonical_json,
)
from chandlery.registry.endpoint import Endpoint, RefusedError, error_response
from chandlery.registry.negotiation import accepted_formats, entity_tag, is_known, is_unwanted, wanted_ranges
from chandlery.registry.ranges import Multipart, UnsatisfiableRangeError
from chandlery.registry.response_cache import CachedResponse
from chandlery.registry.token_endpoint import TokenEndpoint
from chandlery.registry.waiting import WaitPolicy
from chandlery.storage.blob_store import BlobInfo, BlobReader, content_of
from chandlery.storage.byte_range import ByteRange

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# distribution-spec, "Pushing manifests": larger ones need not be taken.
_LARGEST_MANIFEST = 4 << 20
_MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST, OCI_INDEX, DOCKER_MANIFEST_LIST})

# distribution-spec, "Warnings": clients may cut what is longer than 4096 bytes in all.
_LONGEST_WARNING = 4000

_BLOB_TYPE = "application/octet-stream"
_FOR_EVER = "max-age=31536000, immutable"

# Bytes.
_MANIFESTS_IN_MEMORY = 32 << 20

# Seconds for which a client that is sent to a bucket can begin there; it comes back here for more.
_URL_LIFETIME = 1200.0


@dataclass(frozen=True, slots=True)
class Access:
    """How clients wait, and who may ask for what: all may without."""

    wait: WaitPolicy = field(default_factory=WaitPolicy)
    control: AccessControl | None = None


_DEFAULT_ACCESS = Access()


class ImageSource(Protocol):
    """Where images come from; every method may raise any `ChandleryError`."""

    async def pull(
        self,
        request: ImageRequest,
        client: str,
        deadline: Deadline,
        *,
        index: bool,
        permission: Permission = EVERYTHING,
    ) -> Pulled:
        """Return what a tag names, building it if need be: an image, or an index if the client takes one.

        Its blobs and manifests are in the blob store. `client` is for fairness. What the `permission`
        refuses is neither built nor returned: `PullDeniedError`. At the deadline
        `BuildPendingError` is raised, and the build goes on. Cancelling the call must not stop a build that
        another client waits for.
        """
        ...

    async def tags(
        self, request: ImageRequest, client: str, deadline: Deadline, permission: Permission = EVERYTHING
    ) -> Sequence[str]:
        """Return the tags that an image has for who has the permission, in any order.

        The request's reference means nothing here. `client` and `deadline` are for what has to be evaluated
        for that, as with `pull`.
        """
        ...

    async def needs(self, request: ImageRequest, digest: Digest, permission: Permission = EVERYTHING) -> bool:
        """Return whether an image of this name was made that needs a blob, and may be pulled.

        At whatever revision that was.
        """
        ...

    @property
    def max_age(self) -> float:
        """For how many seconds blobs that are only described need not be looked at again."""
        ...

    async def is_current(self, pulled: Pulled, *, whole: bool) -> bool:
        """Return whether `pull` would give the same now, and with `whole` that all of its blobs are there.

        It builds nothing, and may raise any `ChandleryError`.
        """
        ...


class ServedBlobs(BlobReader, Protocol):
    """Where blobs come from."""

    async def obtain(self, digest: Digest, deadline: Deadline, client: str) -> BlobInfo | None:
        """Return what is known of a blob that is there and whole, made again if it was lost.

        That counts for the client if the image had been collected. None means that no image ever needed it.
        Raises `BuildPendingError` at the deadline, when it is still being made again, and
        `BlobNotFoundError` with the reason if it can't be.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What a request for a manifest comes to.

    `check` tells whether the same request would come to the same, within `max_age` seconds for sure; without
    it each request is looked into.
    """

    descriptor: Descriptor
    content: bytes
    headers: Mapping[str, str]
    check: Callable[[], Awaitable[bool]] | None
    max_age: float


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
    images: ImageSource, blobs: ServedBlobs, name_prefixes: NamePrefixes, access: Access = _DEFAULT_ACCESS
) -> list[Route]:
    """Return the routes of /v2; `name_prefixes` is that of image names."""
    api = _RegistryAPI(images, blobs, name_prefixes, access)
    endpoint = partial(Endpoint, access.control)
    accounts = access.control.accounts if access.control else None
    token_routes = []
    if access.control and accounts:
        token = TokenEndpoint(access.control, accounts, name_prefixes)
        token_routes = [Route(TOKEN_PATH, endpoint(token, ("GET", "POST")), name="token")]
    # A name may hold "manifests" or "blobs" as well: {name:rest} takes as much as it can, so the rightmost
    # counts.
    return [
        Route("/v2", endpoint(api.base), name="base"),
        Route("/v2/", endpoint(api.base), name="base"),
        *token_routes,
        Route("/v2/{name:rest}/manifests/{reference}", endpoint(api.manifest), name="manifest"),
        Route("/v2/{name:rest}/blobs/{digest}", endpoint(api.blob), name="blob"),
        Route("/v2/{name:rest}/tags/list", endpoint(api.tags), name="tags"),
        Route("/v2/{name:rest}/referrers/{digest}", endpoint(api.referrers), name="referrers"),
        Route("/v2/{name:rest}/blobs/uploads/{session:rest}", endpoint(api.upload), name="upload"),
        Route("/v2/_catalog", endpoint(api.catalog), name="catalog"),
        Route("/v2/{rest:rest}", endpoint(api.unknown), name="unknown"),
    ]


class _RegistryAPI:
    """The handlers, in the order of distribution-spec's table of endpoints."""

    def __init__(
        self, images: ImageSource, blobs: ServedBlobs, name_prefixes: NamePrefixes, access: Access
    ) -> None:
        self._images = images
        self._blobs = blobs
        self._name_prefixes = name_prefixes
        self._access = access
        # What not everybody may have, a cache that many share may not keep.
        self._for_ever = f"{'private' if access.control else 'public'}, {_FOR_EVER}"
        self._contents: LRUCache[Digest, bytes] = LRUCache(_MANIFESTS_IN_MEMORY, getsizeof=len)

    async def base(self, request: Request) -> Response:
        """Say that this is a registry (end-1), to clients that may know; they ask so whether to log in."""
        if self._access.control:
            await self._access.control.admit(request)
        return Response(b"{}", media_type="application/json")

    async def blob(self, request: Request) -> Response:
        """Return a blob or ranges of it (end-2)."""
        deadline = Deadline.after(self._access.wait.hold)
        wanted = await self._image_request(request)
        digest = Digest.parse(request.path_params["digest"])
        info = await self._obtain(request, wanted, digest, deadline)
        if info is None:
            raise BlobNotFoundError(str(digest))
        headers = {**_digest_headers(digest), "cache-control": self._for_ever, "accept-ranges": "bytes"}
        _check_wanted(request, digest)
        if is_known(request.headers, digest):
            return Response(status_code=304, headers=headers)
        ranges = _ranges(request, digest, info.size)
        url = await self._blobs.url(digest, _URL_LIFETIME) if _may_be_sent_on(request, ranges) else None
        if url:
            headers |= {"location": url, "cache-control": "no-store"}
            return Response(status_code=307, headers=headers)
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
        """Serve a manifest (end-3): a tag's is built now if need be, a digest's if it was there once."""
        deadline = Deadline.after(self._access.wait.hold)
        reference = request.path_params["reference"]
        try:
            if image_name.is_digest(reference):
                found = await self._manifest_by_digest(request, Digest.parse(reference), deadline)
            else:
                found = await self._manifest_by_tag(request, reference, deadline)
        except BuildPendingError as pending:
            return self._keep_waiting(request, pending)
        digest = found.descriptor.digest
        headers = {**found.headers, **_digest_headers(digest)}
        _check_wanted(request, digest)
        if is_known(request.headers, digest):
            return Response(status_code=304, headers=headers)
        if self._access.control or found.check is None:
            return Response(found.content, headers=headers, media_type=found.descriptor.media_type)
        return CachedResponse(found.content, headers, found.descriptor.media_type, found.check, found.max_age)

    async def _manifest_by_digest(self, request: Request, digest: Digest, deadline: Deadline) -> _Manifest:
        wanted = await self._image_request(request)
        descriptor, content = await self._described(request, wanted, digest, deadline)
        headers = {"cache-control": self._for_ever}
        check = partial(self._is_there, digest, self._client(request))
        return _Manifest(descriptor, content, headers, check, self._images.max_age)

    async def _manifest_by_tag(self, request: Request, tag: str, deadline: Deadline) -> _Manifest:
        wanted = await self._image_request(request, tag)
        accepted = accepted_formats(request.headers.getlist("accept"))
        takes_index = accepted.index is not None
        pulled = await self._images.pull(
            *(wanted, self._client(request), deadline),
            index=takes_index,
            permission=_permission(request),
        )
        descriptor = pulled.manifests[accepted.manifest]
        if accepted.index and pulled.is_index:
            descriptor = pulled.manifests[accepted.index]
        content = await self._read(descriptor.digest)
        # What a tag names may change, and depends on Accept: ask again each time, and get a 304.
        headers = {"cache-control": "no-cache", "vary": "Accept", **_pull_headers(pulled)}
        # What a person should know is logged as well, each time.
        check = None if pulled.warnings else self._check(pulled)
        return _Manifest(descriptor, content, headers, check, 0.0)

    async def _is_there(self, digest: Digest, client: str) -> bool:
        deadline = Deadline.after(self._access.wait.hold)
        return await self._blobs.obtain(digest, deadline, client) is not None

    def _check(self, pulled: Pulled) -> Callable[[], Awaitable[bool]]:
        """Make what tells whether a tag still means what was pulled; its blobs are looked at now and then."""
        whole_until = time.monotonic() + self._images.max_age

        async def check() -> bool:
            nonlocal whole_until
            now = time.monotonic()
            whole = now >= whole_until
            current = await self._images.is_current(pulled, whole=whole)
            if whole:
                whole_until = now + self._images.max_age
            return current

        return check

    def _keep_waiting(self, request: Request, pending: BuildPendingError) -> Response:
        """Send a request on to itself, so that its client goes on waiting, or say that it waited enough."""
        # Not request.url: it fails if the query isn't UTF-8.
        query = request.scope["query_string"].decode("latin-1")
        location = self._access.wait.next_location(request.scope["path"], query)
        if location is None:
            raise pending
        headers = {"location": location}
        return error_response(request, 307, "TOOMANYREQUESTS", str(pending), vars(pending), headers)

    def _client(self, request: Request) -> str:
        """Return what a client is counted under; with access control, `_image_request` has found out."""
        if self._access.control:
            return str(request.state.client)
        return client_network(client_address.noted(request))

    async def tags(self, request: Request) -> Response:
        """List tags (end-8a and end-8b)."""
        deadline = Deadline.after(self._access.wait.hold)
        wanted = await self._image_request(request)
        try:
            known = await self._images.tags(wanted, self._client(request), deadline, _permission(request))
        except BuildPendingError as pending:
            return self._keep_waiting(request, pending)
        name = request.path_params["name"]
        tags, more = _page(known, request.query_params.get("n"), request.query_params.get("last"))
        headers = {"cache-control": "no-cache"}
        if more:
            # An absolute path: containers/image asks for it as it stands.
            query = urlencode({"n": len(tags), "last": tags[-1]})
            headers["link"] = f'</v2/{name}/tags/list?{query}>; rel="next"'
        body = canonical_json({"name": name, "tags": tags})
        return Response(body, headers=headers, media_type="application/json")

    async def referrers(self, request: Request) -> Response:
        """List what refers to a manifest (end-12a): nothing does, since nothing is pushed."""
        await self._image_request(request)
        Digest.parse(request.path_params["digest"])
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        # "If filtering is requested and applied, the response MUST include" this header (distribution-spec).
        filtered = {"oci-filters-applied": "artifactType"} if "artifactType" in request.query_params else {}
        return Response(canonical_json(index), headers=filtered, media_type=OCI_INDEX)

    async def catalog(self, _: Request) -> Response:
        """Refuse Docker's list of all names, which isn't in distribution-spec."""
        raise RefusedError(404, "UNSUPPORTED", "there is no list: every mix of packages is a name")

    async def upload(self, request: Request) -> Response:
        """Say that there is no such upload (end-13): none was ever begun."""
        raise RefusedError(404, "BLOB_UPLOAD_UNKNOWN", "nothing can be pushed, so there is no upload here")

    async def unknown(self, request: Request) -> Response:
        """Refuse every other path."""
        raise RefusedError(404, "UNSUPPORTED", f"{request.scope['path']} is not in the distribution API")

    async def _image_request(self, request: Request, reference: str = image_name.LATEST) -> ImageRequest:
        """Read the name in a path, and see that its client may ask for it."""
        control, name = self._access.control, request.path_params["name"]
        if control is None:
            return image_name.parse(name, reference, self._name_prefixes)
        # What a name means here, only those may know who are let in.
        image_name.check(name, reference)
        client = await control.admit(request)
        wanted = image_name.parse(name, reference, self._name_prefixes)
        request.state.permission = control.authorize(client, name, wanted)
        request.state.client = client.key
        return wanted

    async def _obtain(
        self, request: Request, wanted: ImageRequest, digest: Digest, deadline: Deadline
    ) -> BlobInfo | None:
        """Return what is known of a blob, if who may have the image may have it."""
        control = self._access.control
        if (
            control
            and control.restricts
            and not await self._images.needs(wanted, digest, _permission(request))
        ):
            return None
        return await self._blobs.obtain(digest, deadline, self._client(request))

    async def _described(
        self, request: Request, wanted: ImageRequest, digest: Digest, deadline: Deadline
    ) -> tuple[Descriptor, bytes]:
        """Read a manifest, and be sure that it is one: the blob store also holds layers and configs."""
        name = wanted.name
        try:
            info = await self._obtain(request, wanted, digest, deadline)
        except BlobNotFoundError as error:
            raise ReferenceNotFoundError(name, str(digest), error.reason) from error
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
        """Return a manifest that is there; damaged ones aren't kept in memory."""
        content = self._contents.get(digest)
        if content is None:
            content = await content_of(self._blobs, digest)
            if Digest.of(content) == digest and len(content) <= self._contents.maxsize:
                self._contents[digest] = content
        return content

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


def _permission(request: Request) -> Permission:
    """Return what the client may have, as `_image_request` has found out; without access control all."""
    return getattr(request.state, "permission", EVERYTHING)


def _page(tags: Iterable[str], n: str | None, last: str | None) -> tuple[list[str], bool]:
    """Return the tags after `last`, at most `n` of them, and whether more follow."""
    # "The tags MUST be in lexical or 'ASCIIbetical' order" (distribution-spec); 1.1.0 and before had no
    # regard to case, but the conformance tests have.
    after = sorted(tag for tag in set(tags) if last is None or tag > last)
    if n is None:
        return after, False
    if re.fullmatch(r"[0-9]{1,18}", n) is None:
        raise RefusedError(400, "UNSUPPORTED", f"n is {n[:20]!r}: expected a number of tags")
    # "If <int> is zero, ... the registry MUST NOT include a Link header" (distribution-spec).
    return after[: int(n)], 0 < int(n) < len(after)


def _ranges(request: Request, digest: Digest, size: int) -> Sequence[ByteRange]:
    """Return the ranges of a blob that the request is for; none means all of it."""
    # Range means something with GET only (RFC 9110, section 14.2).
    if request.method != "GET":
        return ()
    try:
        return wanted_ranges(request.headers, digest, size)
    except UnsatisfiableRangeError as error:
        raise RefusedError(
            416, "UNSUPPORTED", str(error), {"content-range": f"bytes */{error.size}"}
        ) from error


def _pull_headers(pulled: Pulled) -> dict[str, str]:
    """Tell the revision that was pulled, and what the person who pulls should know.

    Clients print a warning (distribution-spec, "Warnings"), which has neither quotes nor line breaks; of one
    with a second quoted text containers/image prints nothing.
    """
    headers = {"chandlery-revision": pulled.pin.revision}
    if pulled.warnings:
        text = re.sub(r'[^ -~]|["\\]', " ", "; ".join(pulled.warnings))
        headers["warning"] = f'299 - "{text[:_LONGEST_WARNING]}"'
    return headers


def _may_be_sent_on(request: Request, ranges: Sequence[ByteRange]) -> bool:
    """Return whether another server, with entity tags of its own, would give the same answer."""
    tags_count = "if-match" in request.headers or "if-range" in request.headers
    return request.method == "GET" and len(ranges) <= 1 and not tags_count


def _check_wanted(request: Request, digest: Digest) -> None:
    if is_unwanted(request.headers, digest):
        raise RefusedError(412, "UNSUPPORTED", f"the content is {digest}, which If-Match does not name")


def _digest_headers(digest: Digest) -> dict[str, str]:
    return {"docker-content-digest": str(digest), "etag": entity_tag(digest)}
