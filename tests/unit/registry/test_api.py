import inspect
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import Message, Scope
from structlog.testing import capture_logs

from chandlery import errors
from chandlery.access.client_address import parse_networks
from chandlery.errors import (
    BlobNotFoundError,
    BuildError,
    BuildPendingError,
    BuildTimeoutError,
    BuildTooLargeError,
    ChandleryError,
    CredentialsError,
    EvaluationError,
    EvaluationPendingError,
    LowDiskError,
    NixMissingError,
    PackagesNotFoundError,
    ReferenceNotFoundError,
    SettingsError,
    SourceUnavailableError,
    StorageFullError,
    TryAgainError,
)
from chandlery.image import name as image_name
from chandlery.machine.deadline import Deadline
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    DOCKER_MANIFEST,
    DOCKER_MANIFEST_LIST,
    INDEX_MEDIA_TYPE,
    MANIFEST_MEDIA_TYPE,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    BuiltImage,
    Descriptor,
    ManifestFormat,
    Platform,
    image_index,
    image_manifest,
)
from chandlery.registry import api as registry_api
from chandlery.registry import endpoint
from chandlery.registry.api import Access, routes
from chandlery.registry.endpoint import ANSWERS
from chandlery.registry.waiting import WaitPolicy
from chandlery.server.request_log import RequestLog
from chandlery.storage.blob_store import BlobInfo, BlobStore
from chandlery.storage.file_store import FileBlobStore
from tests.support.memory_blob_store import MemoryBlobStore
from tests.support.one_image import HOST, LAYER, MISSING, PIN, OneImage, oci_error, one_image
from tests.support.served_blobs import AsTheyAre

REFUSALS = [
    kind({"git": {"reason": kind.reason, "message": "because"}}) for kind in EvaluationError.__subclasses__()
]


@dataclass
class Registry:
    client: httpx.AsyncClient
    images: OneImage
    layer: Digest
    routes: Sequence[Route]

    def manifest(self, manifest_format: ManifestFormat) -> Descriptor:
        return self.images.image_.manifests[manifest_format]

    async def get(self, path: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.get(path, headers=named)


@pytest.fixture(params=["files", "memory"])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlobStore]:
    if request.param == "memory":
        yield MemoryBlobStore()
    else:
        with FileBlobStore(tmp_path) as store:
            yield store


@pytest.fixture
async def registry(blobs: BlobStore) -> AsyncIterator[Registry]:
    images = OneImage(await one_image(blobs))
    api = routes(images, AsTheyAre(blobs), HOST)
    transport = httpx.ASGITransport(Starlette(routes=api))
    async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
        yield Registry(client, images, Digest.of(LAYER), api)


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
async def test_the_base_says_that_this_is_a_registry(registry: Registry, path: str) -> None:
    response = await registry.get(path)
    assert (response.status_code, response.json()) == (200, {})
    assert response.headers["docker-distribution-api-version"] == "registry/2.0"


# Indexes


@pytest.fixture
async def index(registry: Registry, blobs: BlobStore) -> Mapping[ManifestFormat, Descriptor]:
    registry.images.index = {
        each: await blobs.put_bytes(
            image_index(each, [(Platform("linux", "arm64"), registry.manifest(each))]), media_type
        )
        for each, media_type in INDEX_MEDIA_TYPE.items()
    }
    return registry.images.index


@pytest.mark.parametrize("name", ["git", "arm64/git"])
@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (f"{OCI_MANIFEST}, {OCI_INDEX}", ManifestFormat.OCI),
        (f"{DOCKER_MANIFEST}, {DOCKER_MANIFEST_LIST}", ManifestFormat.DOCKER),
    ],
)
async def test_an_index_is_given_to_those_that_take_one(
    registry: Registry,
    index: Mapping[ManifestFormat, Descriptor],
    name: str,
    accept: str,
    wanted: ManifestFormat,
) -> None:
    response = await registry.get(f"/v2/{name}/manifests/latest", accept=accept)
    assert response.headers["content-type"] == INDEX_MEDIA_TYPE[wanted]
    assert response.headers["docker-content-digest"] == str(index[wanted].digest)
    assert Digest.of(response.content) == index[wanted].digest
    again = await registry.get(f"/v2/{name}/manifests/{index[wanted].digest}")
    assert (again.status_code, again.headers["content-type"]) == (200, INDEX_MEDIA_TYPE[wanted])
    assert again.content == response.content


@pytest.mark.parametrize("accept", ["", "*/*", OCI_MANIFEST, DOCKER_MANIFEST])
async def test_no_index_is_given_to_those_that_list_none(
    registry: Registry, index: Mapping[ManifestFormat, Descriptor], accept: str
) -> None:
    response = await registry.get("/v2/git/manifests/latest", accept=accept)
    assert response.headers["content-type"] in MANIFEST_MEDIA_TYPE.values()


async def test_what_a_person_should_know_is_a_warning_that_clients_print(registry: Registry) -> None:
    registry.images.warnings = ("the mirror is dead", 'no image for "arm64":\nold\\\u20ac')
    response = await registry.get("/v2/git/manifests/latest")
    assert response.status_code == 200
    assert response.headers["warning"] == '299 - "the mirror is dead; no image for  arm64 : old  "'


# Manifests


async def test_a_tag_is_built_and_its_manifest_described(registry: Registry) -> None:
    response = await registry.get("/v2/shell/git/jq/manifests/latest")
    descriptor = registry.manifest(ManifestFormat.OCI)
    assert response.status_code == 200
    assert registry.images.requests == [image_name.parse("shell/git/jq", "latest", HOST)]
    assert Digest.of(response.content) == descriptor.digest
    assert {
        name: value for name, value in response.headers.items() if name != "docker-distribution-api-version"
    } == {
        "content-type": OCI_MANIFEST,
        "content-length": str(descriptor.size),
        "docker-content-digest": str(descriptor.digest),
        "etag": f'"{descriptor.digest}"',
        "vary": "Accept",
        "cache-control": "no-cache",
        "chandlery-revision": PIN.revision,
    }


async def test_docker_gets_the_manifest_that_it_asks_for(registry: Registry) -> None:
    response = await registry.get("/v2/git/manifests/latest", accept=DOCKER_MANIFEST)
    assert response.headers["content-type"] == response.json()["mediaType"] == DOCKER_MANIFEST
    assert Digest.of(response.content) == registry.manifest(ManifestFormat.DOCKER).digest


async def test_several_accept_headers_count_as_one(registry: Registry) -> None:
    accepts = [("accept", DOCKER_MANIFEST), ("accept", OCI_MANIFEST)]
    response = await registry.client.get("/v2/git/manifests/latest", headers=accepts)
    assert response.headers["content-type"] == OCI_MANIFEST


@pytest.mark.parametrize("manifest_format", ManifestFormat)
async def test_a_digest_names_one_manifest_whatever_accept_says(
    registry: Registry, manifest_format: ManifestFormat
) -> None:
    descriptor = registry.manifest(manifest_format)
    for accept in (OCI_MANIFEST, DOCKER_MANIFEST, "text/html"):
        response = await registry.get(f"/v2/git/manifests/{descriptor.digest}", accept=accept)
        assert response.headers["content-type"] == descriptor.media_type
        assert response.headers["docker-content-digest"] == str(descriptor.digest)
        assert "immutable" in response.headers["cache-control"]
        assert "vary" not in response.headers
        assert Digest.of(response.content) == descriptor.digest
    assert registry.images.requests == []


async def test_a_blob_that_is_no_manifest_is_not_served_as_one(registry: Registry) -> None:
    for digest in (registry.layer, registry.images.image_.config.digest, MISSING):
        response = await registry.get(f"/v2/git/manifests/{digest}")
        assert response.status_code == 404
        assert oci_error(response)["code"] == "MANIFEST_UNKNOWN"


async def test_a_manifest_larger_than_the_limit_is_not_read(registry: Registry, blobs: BlobStore) -> None:
    config = Descriptor(OCI_CONFIG, MISSING, 0, {"long": "x" * (4 << 20)})
    large = await blobs.put_bytes(image_manifest(ManifestFormat.OCI, b"{}", [config], {}), OCI_MANIFEST)
    assert (await registry.get(f"/v2/git/manifests/{large.digest}")).status_code == 404


@pytest.mark.parametrize(
    "template",
    ["/v2/git/manifests/latest", "/v2/git/manifests/{manifest}", "/v2/git/blobs/{layer}", "/v2/", "/v2/x"],
)
async def test_head_has_the_headers_of_get_and_no_body(registry: Registry, template: str) -> None:
    path = template.format(manifest=registry.manifest(ManifestFormat.OCI).digest, layer=registry.layer)
    get, head = await registry.client.get(path), await registry.client.head(path)
    assert head.content == b""
    assert head.status_code == get.status_code
    # FileResponse tells the time of the file as well, which nobody needs.
    assert set(get.headers.items()) - set(head.headers.items()) <= {
        ("last-modified", get.headers.get("last-modified"))
    }


@pytest.mark.parametrize("template", ["/v2/git/manifests/latest", "/v2/git/manifests/{0}"])
async def test_a_manifest_that_the_client_has_is_not_sent_again(registry: Registry, template: str) -> None:
    digest = registry.manifest(ManifestFormat.OCI).digest
    for known in (f'"{digest}"', f'W/"{digest}"', f'"other", "{digest}"', "*"):
        response = await registry.get(template.format(digest), if_none_match=known)
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == f'"{digest}"'
    response = await registry.get(template.format(digest), if_none_match=f'"{MISSING}"')
    assert response.status_code == 200


@pytest.mark.parametrize(
    "template", ["/v2/git/manifests/latest", "/v2/git/manifests/{0}", "/v2/git/blobs/{0}"]
)
async def test_content_that_the_client_does_not_want_is_not_sent(registry: Registry, template: str) -> None:
    path = template.format(registry.manifest(ManifestFormat.OCI).digest)
    for wanted in (registry.manifest(ManifestFormat.OCI).digest, MISSING):
        response = await registry.get(path, if_match=f'"{wanted}"')
        assert response.status_code == (412 if wanted == MISSING else 200)
    assert oci_error(response)["code"] == "UNSUPPORTED"


# Names and references


@pytest.mark.parametrize(
    ("path", "packages"),
    [
        ("/v2/manifests/manifests/latest", ("manifests",)),
        ("/v2/a/manifests/b/manifests/latest", ("a", "b", "manifests")),
        ("/v2/a/blobs/tags/list/manifests/latest", ("a", "blobs", "list", "tags")),
        ("/v2/blobs/uploads/manifests/latest", ("blobs", "uploads")),
        ("/v2/a/manifests/tags/list", ("a", "manifests")),
        ("/v2/a%2Fb/manifests/latest", ("a", "b")),
    ],
)
async def test_a_name_may_hold_the_words_of_the_api(
    registry: Registry, path: str, packages: tuple[str, ...]
) -> None:
    assert (await registry.get(path)).status_code == 200
    assert registry.images.requests[0].packages == packages


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v2/Git/manifests/latest", 400, "NAME_INVALID"),
        ("/v2/git/%2E%2E/jq/manifests/latest", 400, "NAME_INVALID"),
        ("/v2/git//jq/manifests/latest", 400, "NAME_INVALID"),
        ("/v2//manifests/latest", 400, "NAME_INVALID"),
        ("/v2/git%0A/manifests/latest", 400, "NAME_INVALID"),
        ("/v2/amd64/manifests/latest", 400, "NAME_INVALID"),
        (f"/v2/Git/manifests/{MISSING}", 400, "NAME_INVALID"),
        (f"/v2/Git/blobs/{MISSING}", 400, "NAME_INVALID"),
        ("/v2/Git/tags/list", 400, "NAME_INVALID"),
        ("/v2/git/manifests/.hidden", 404, "MANIFEST_UNKNOWN"),
        ("/v2/git/manifests/sha256:abc", 400, "DIGEST_INVALID"),
        (f"/v2/git/manifests/sha512:{MISSING.hex * 2}", 400, "DIGEST_INVALID"),
        ("/v2/git/blobs/latest", 400, "DIGEST_INVALID"),
        ("/v2/git/blobs/sha256:..%2F..%2Fetc", 404, "UNSUPPORTED"),
        (f"/v2/git/blobs/{MISSING}", 404, "BLOB_UNKNOWN"),
        ("/v2/git/referrers/latest", 400, "DIGEST_INVALID"),
        ("/v2/_catalog", 404, "UNSUPPORTED"),
        ("/v2/git", 404, "UNSUPPORTED"),
        ("/v2/git/manifests/", 404, "UNSUPPORTED"),
        ("/v2/git%0A", 404, "UNSUPPORTED"),
    ],
)
async def test_what_is_no_part_of_the_api_gets_an_oci_error(
    registry: Registry, path: str, status: int, code: str
) -> None:
    response = await registry.client.get(httpx.URL("http://registry").copy_with(raw_path=path.encode()))
    assert (response.status_code, oci_error(response)["code"]) == (status, code)
    assert registry.images.requests == []


WORDS = st.sampled_from(
    ["manifests", "blobs", "tags", "list", "uploads", "referrers", "git", "latest", "..", ""]
)


@given(
    parts=st.lists(WORDS | st.text(), max_size=6), method=st.sampled_from(["GET", "POST", "HEAD", "DELETE"])
)
async def test_any_path_gets_an_answer_of_the_api(parts: list[str], method: str) -> None:
    images = OneImage(BuiltImage({}, Descriptor("", MISSING, 0), (), 0, 0), PackagesNotFoundError(["x"], {}))
    app = Starlette(routes=routes(images, AsTheyAre(MemoryBlobStore()), HOST))
    messages: list[Any] = []

    async def receive() -> Any:
        raise NotImplementedError

    async def send(message: Any) -> None:
        messages.append(message)

    path = "/v2/" + "/".join(parts)
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
    await app(scope, receive, send)
    headers = dict(messages[0]["headers"])
    assert messages[0]["status"] in (200, 400, 404, 405)
    assert headers[b"content-type"] in (b"application/json", OCI_INDEX.encode())
    body = b"".join(message["body"] for message in messages[1:])
    assert (body == b"") if method == "HEAD" else isinstance(json.loads(body), dict)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v2/", "GET, HEAD"),
        ("/v2/git/manifests/latest", "GET, HEAD"),
        (f"/v2/git/blobs/{MISSING}", "GET, HEAD"),
        ("/v2/git/tags/list", "GET, HEAD"),
        ("/v2/git/blobs/uploads/", "GET, HEAD"),
        ("/v2/git/blobs/uploads/1234-5678", "GET, HEAD"),
    ],
)
async def test_writes_are_not_supported(registry: Registry, method: str, path: str, allowed: str) -> None:
    response = await registry.client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allowed
    assert oci_error(response)["code"] == "UNSUPPORTED"


@pytest.mark.parametrize("session", ["", "1234-5678"])
async def test_there_is_no_upload(registry: Registry, session: str) -> None:
    # What Allow names on a 405 is no 405 itself.
    response = await registry.get(f"/v2/git/blobs/uploads/{session}")
    assert response.status_code == 404
    assert oci_error(response)["code"] == "BLOB_UPLOAD_UNKNOWN"


# Errors


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PackagesNotFoundError(["gti", "jqq"], {"gti": ["git"]}), 404, "MANIFEST_UNKNOWN"),
        (ReferenceNotFoundError("git", "v9", "only latest"), 404, "MANIFEST_UNKNOWN"),
        (BuildError("git", "exit code 1", ["cc: not found"]), 422, "MANIFEST_UNKNOWN"),
        (BuildTimeoutError("git", 3600, ["still compiling"]), 422, "MANIFEST_UNKNOWN"),
        *((error, 422, "MANIFEST_UNKNOWN") for error in REFUSALS),
        (SourceUnavailableError("debian!bookworm", "no route"), 424, "UNSUPPORTED"),
        (StorageFullError("/data"), 424, "UNSUPPORTED"),
        (LowDiskError("/data", 1, 2), 424, "UNSUPPORTED"),
        (BuildTooLargeError("git", "is too large", 2, 1, "max_closure_size"), 422, "MANIFEST_UNKNOWN"),
        (NixMissingError("nix-build"), 424, "UNSUPPORTED"),
        (SettingsError("no such folder"), 424, "UNSUPPORTED"),
    ],
)
async def test_why_a_pull_failed_is_said_with_a_status_that_clients_print(
    registry: Registry, error: ChandleryError, status: int, code: str
) -> None:
    registry.images.error = error
    response = await registry.get("/v2/git/manifests/latest")
    assert response.status_code == status
    assert oci_error(response) == {
        "code": code,
        "message": str(error),
        "detail": json.loads(json.dumps(vars(error))),
    }


async def test_missing_packages_are_named_in_the_message_and_as_data(registry: Registry) -> None:
    registry.images.error = PackagesNotFoundError(["gti", "jqq"], {"gti": ["git", "gitui"]})
    error = oci_error(await registry.get("/v2/gti/jqq/manifests/latest"))
    assert error["message"] == "not in the package set: gti (did you mean git, gitui?), jqq"
    assert error["detail"] == {"missing": ["gti", "jqq"], "suggestions": {"gti": ["git", "gitui"]}}


def test_clients_print_no_message_with_a_5xx_so_no_domain_error_has_one() -> None:
    kinds = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ChandleryError)
    ]
    for kind in kinds:
        status, code = next(ANSWERS[base] for base in kind.__mro__ if base in ANSWERS)
        assert 400 <= status < 500
        # containerd asks six times at once, podman for minutes: only for what will be better then. With 401,
        # clients ask for a password.
        assert status != 408
        assert (status == 401) == issubclass(kind, CredentialsError)
        assert (status == 429) == issubclass(kind, TryAgainError)
        assert code.isupper()


async def test_who_waits_for_a_build_is_sent_on_to_the_same_request_nine_times(registry: Registry) -> None:
    registry.images.error = BuildPendingError("git", "some-id", 3)
    path = "/v2/shell/git/manifests/latest"
    for method in ("GET", "HEAD"):
        url = f"{path}?ns=docker.io"
        for _ in range(9):
            response = await registry.client.request(method, url)
            assert response.status_code == 307
            url = str(response.next_request.url) if response.next_request else ""
            assert httpx.URL(url).path == path
            assert httpx.URL(url).params["ns"] == "docker.io"
        response = await registry.client.request(method, url)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
    response = await registry.get(url)
    error = oci_error(response)
    assert error["code"] == "TOOMANYREQUESTS"
    assert "number 3 in the queue" in error["message"]
    assert error["detail"]["build"] == "some-id"


async def test_a_request_is_held_as_long_as_the_settings_say(blobs: BlobStore) -> None:
    images = OneImage(await one_image(blobs))
    app = Starlette(routes=routes(images, AsTheyAre(blobs), HOST, Access(WaitPolicy(hold=7.5))))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://registry") as client:
        await client.get("/v2/git/manifests/latest")
    [(_, left)] = images.clients
    assert left == pytest.approx(7.5, abs=5)
    assert left <= 7.5


class BlobsToBeMended(AsTheyAre):
    """Blobs that were all lost."""

    def __init__(self, error: ChandleryError) -> None:
        super().__init__(MemoryBlobStore())
        self._error = error

    async def obtain(self, digest: Digest, deadline: Deadline, client: str) -> BlobInfo | None:
        raise self._error


@asynccontextmanager
async def without_blobs(error: ChandleryError) -> AsyncIterator[httpx.AsyncClient]:
    images = OneImage(BuiltImage({}, Descriptor("", MISSING, 0), (), 0, 0))
    app = Starlette(routes=routes(images, BlobsToBeMended(error), HOST))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://registry") as client:
        yield client


async def test_who_asks_for_what_is_made_again_waits_as_for_a_new_image() -> None:
    async with without_blobs(BuildPendingError("git", "some-id", 3)) as client:
        manifest = await client.get(f"/v2/git/manifests/{MISSING}")
        assert manifest.status_code == 307
        assert httpx.URL(manifest.headers["location"]).path == f"./{MISSING}"
        blob = await client.get(f"/v2/git/blobs/{MISSING}")
        assert blob.status_code == 429
        assert int(blob.headers["retry-after"]) > 0


async def test_what_can_not_be_made_again_is_not_found_and_the_reason_is_told() -> None:
    async with without_blobs(BlobNotFoundError(str(MISSING), "its revision is gone")) as client:
        for kind, code in [("manifests", "MANIFEST_UNKNOWN"), ("blobs", "BLOB_UNKNOWN")]:
            response = await client.get(f"/v2/git/{kind}/{MISSING}")
            assert response.status_code == 404
            assert oci_error(response)["code"] == code
            assert "its revision is gone" in response.text


async def test_who_lists_tags_waits_for_an_evaluation_as_for_a_new_image(blobs: BlobStore) -> None:
    images = OneImage(await one_image(blobs), error=EvaluationPendingError("git"))
    access = Access(WaitPolicy(hold=7.5, redirections=1))
    app = Starlette(routes=routes(images, AsTheyAre(blobs), HOST, access))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://registry") as client:
        sent_on = await client.get("/v2/git/tags/list?n=2")
        assert sent_on.status_code == 307
        again = httpx.URL("http://registry/v2/git/tags/list").join(sent_on.headers["location"])
        assert again.path == "/v2/git/tags/list"
        assert again.params["n"] == "2"
        refused = await client.get(again)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
    assert "evaluated" in oci_error(refused)["message"]
    assert [left <= 7.5 for _, left in images.clients] == [True, True]


async def test_addresses_of_one_network_are_one_client(blobs: BlobStore) -> None:
    images = OneImage(await one_image(blobs))
    app = Starlette(routes=routes(images, AsTheyAre(blobs), HOST))
    for address in ("2001:db8::1", "2001:db8::2"):
        transport = httpx.ASGITransport(app, client=(address, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
            for path in ("manifests/latest", "tags/list"):
                await client.get(f"/v2/git/{path}")
    assert {client_name for client_name, _ in images.clients} == {"2001:db8::/64"}


async def test_a_blob_that_never_was_has_no_reason(registry: Registry) -> None:
    response = await registry.get(f"/v2/git/blobs/{MISSING}")
    assert oci_error(response)["code"] == "BLOB_UNKNOWN"
    assert oci_error(response)["detail"] == {"digest": str(MISSING)}


async def test_a_client_is_whom_a_trusted_proxy_names_and_nobody_else(blobs: BlobStore) -> None:
    images = OneImage(await one_image(blobs))
    forwarded = {"x-forwarded-for": "192.0.2.7"}
    for trusted in ("127.0.0.1", "10.0.0.1"):
        log = Middleware(RequestLog, trusted_proxies=parse_networks([trusted]))
        app = Starlette(routes=routes(images, AsTheyAre(blobs), HOST), middleware=[log])
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
            await client.get("/v2/git/manifests/latest", headers=forwarded)
    assert [client_name for client_name, _ in images.clients] == ["192.0.2.7", "127.0.0.1"]


# distribution-spec, "Error Codes": "The code field MUST be one of the following". It is about 4XX alone.
SPEC_CODES = {
    *(
        "BLOB_UNKNOWN",
        "BLOB_UPLOAD_INVALID",
        "BLOB_UPLOAD_UNKNOWN",
        "DIGEST_INVALID",
        "MANIFEST_BLOB_UNKNOWN",
    ),
    *("MANIFEST_INVALID", "MANIFEST_UNKNOWN", "NAME_INVALID", "NAME_UNKNOWN", "SIZE_INVALID", "UNAUTHORIZED"),
    *("DENIED", "UNSUPPORTED", "TOOMANYREQUESTS"),
}


def test_every_code_is_one_of_the_specification() -> None:
    sources = inspect.getsource(registry_api) + inspect.getsource(endpoint)
    written = set(re.findall(r"\b4[0-9]{2}, \"([A-Z_]+)\"", sources))
    assert written
    assert written <= SPEC_CODES
    assert {code for _, code in ANSWERS.values()} <= SPEC_CODES


async def test_an_error_has_the_id_by_which_the_log_has_the_request(registry: Registry) -> None:
    registry.images.error = BuildError("git", "exit code 1", [])
    app = Starlette(routes=registry.routes, middleware=[Middleware(RequestLog)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://registry") as client:
        for path in ("/v2/git/manifests/latest", "/v2/Git/manifests/latest", "/v2/git"):
            with capture_logs() as events:
                response = await client.get(path)
            request_id = oci_error(response)["detail"]["request_id"]
            assert request_id == response.headers["x-request-id"] == events[-1]["request_id"]


async def test_a_wait_goes_on_whatever_the_query_and_the_host_are(registry: Registry) -> None:
    registry.images.error = BuildPendingError("git", "some-id", 0)
    for query, host in (("%ff", "["), ("chandlery-wait=%00", "a b")):
        url = httpx.URL("http://registry/v2/git/manifests/latest").copy_with(query=query.encode())
        response = await registry.client.get(url, headers={"host": host})
        assert response.status_code == 307
    raw = b"\xff\xfe=1"
    scope: Scope = {"type": "http", "method": "GET", "path": "/v2/git/manifests/latest", "headers": []}
    messages: list[Any] = []

    async def receive() -> Message:
        raise NotImplementedError

    async def send(message: Message) -> None:
        messages.append(message)

    await Starlette(routes=registry.routes)({**scope, "query_string": raw}, receive, send)
    assert messages[0]["status"] == 307


async def test_an_error_with_bytes_that_are_no_text_is_still_an_answer(registry: Registry) -> None:
    registry.images.error = BuildError("git", "exit code 1", ["caf\udce9"])
    response = await registry.get("/v2/git/manifests/latest")
    assert response.status_code == 422
    assert oci_error(response)["detail"]["log_tail"] == ["caf\udce9"]


async def test_a_fault_of_the_program_is_logged_and_not_shown(registry: Registry) -> None:
    registry.images.error = RuntimeError("a secret")
    with capture_logs() as events:
        response = await registry.get("/v2/git/manifests/latest")
    assert response.status_code == 500
    assert oci_error(response)["code"] == "UNKNOWN"
    assert "secret" not in response.text
    assert [(event["log_level"], event["exc_info"]) for event in events] == [("error", True)]


# Blobs


async def test_a_blob_is_served_whole(registry: Registry) -> None:
    response = await registry.get(f"/v2/git/blobs/{registry.layer}")
    assert (response.status_code, response.content) == (200, LAYER)
    headers = response.headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-length"] == str(len(LAYER))
    assert headers["docker-content-digest"] == str(registry.layer)
    assert headers["etag"] == f'"{registry.layer}"'
    assert headers["accept-ranges"] == "bytes"
    assert "immutable" in headers["cache-control"]


async def test_a_blob_that_the_client_has_is_not_sent_again(registry: Registry) -> None:
    response = await registry.get(f"/v2/git/blobs/{registry.layer}", if_none_match=f'"{registry.layer}"')
    assert (response.status_code, response.content) == (304, b"")


@pytest.mark.parametrize(
    ("header", "start", "stop"), [("bytes=0-0", 0, 1), ("bytes=100-", 100, None), ("bytes=-7", -7, None)]
)
async def test_one_range_is_a_part_of_the_blob(
    registry: Registry, header: str, start: int, stop: int | None
) -> None:
    response = await registry.get(f"/v2/git/blobs/{registry.layer}", range=header)
    part = LAYER[start:stop]
    first = start % len(LAYER)
    assert (response.status_code, response.content) == (206, part)
    assert response.headers["content-length"] == str(len(part))
    assert response.headers["content-range"] == f"bytes {first}-{first + len(part) - 1}/{len(LAYER)}"
    assert response.headers["docker-content-digest"] == str(registry.layer)


async def test_several_ranges_come_as_parts_in_the_order_that_was_asked(registry: Registry) -> None:
    response = await registry.get(f"/v2/git/blobs/{registry.layer}", range="bytes=1000-1999,5-9,-3")
    assert response.status_code == 206
    assert response.headers["content-length"] == str(len(response.content))
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    parts = list(BytesParser(policy=HTTP).parsebytes(head + response.content).iter_parts())
    total = len(LAYER)
    assert [part["Content-Range"] for part in parts] == [
        f"bytes 1000-1999/{total}",
        f"bytes 5-9/{total}",
        f"bytes {total - 3}-{total - 1}/{total}",
    ]
    for content in (LAYER[1000:2000], LAYER[5:10], LAYER[-3:]):
        assert content in response.content


async def test_a_range_outside_the_blob_can_not_be_satisfied(registry: Registry) -> None:
    response = await registry.get(f"/v2/git/blobs/{registry.layer}", range=f"bytes={len(LAYER)}-")
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{len(LAYER)}"
    assert oci_error(response)["code"] == "UNSUPPORTED"


@pytest.mark.parametrize("header", ["bytes=x", "lines=1-2", "bytes=0-9,5-14"])
async def test_a_range_that_makes_no_sense_gets_the_whole_blob(registry: Registry, header: str) -> None:
    response = await registry.get(f"/v2/git/blobs/{registry.layer}", range=header)
    assert (response.status_code, response.content) == (200, LAYER)


async def test_a_range_counts_only_if_the_client_means_this_blob(registry: Registry) -> None:
    path = f"/v2/git/blobs/{registry.layer}"
    same = await registry.get(path, range="bytes=0-9", if_range=f'"{registry.layer}"')
    assert (same.status_code, same.content) == (206, LAYER[:10])
    for other in (f'"{MISSING}"', "Thu, 01 Jan 1970 00:00:01 GMT"):
        response = await registry.get(path, range="bytes=0-9", if_range=other)
        assert (response.status_code, response.content) == (200, LAYER)


async def test_a_range_means_nothing_for_head(registry: Registry) -> None:
    response = await registry.client.head(f"/v2/git/blobs/{registry.layer}", headers={"range": "bytes=0-9"})
    assert response.status_code == 200
    assert response.headers["content-length"] == str(len(LAYER))


async def test_a_server_that_can_sends_the_file_itself(tmp_path: Path) -> None:
    messages: list[Message] = []

    async def receive() -> Message:
        raise NotImplementedError

    async def send(message: Message) -> None:
        messages.append(message)

    with FileBlobStore(tmp_path) as blobs:
        images = OneImage(await one_image(blobs))
        path = f"/v2/git/blobs/{Digest.of(LAYER)}"
        scope: Scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        scope["extensions"] = {"http.response.pathsend": {}}
        await Starlette(routes=routes(images, AsTheyAre(blobs), HOST))(scope, receive, send)
        file = str(blobs.path(Digest.of(LAYER)))
    assert messages[1:] == [{"type": "http.response.pathsend", "path": file}]


# Tags and referrers


@pytest.mark.parametrize(
    ("query", "tags", "link"),
    [
        ("", ["B", "a", "c", "latest"], None),
        ("?n=2", ["B", "a"], '</v2/git/tags/list?n=2&last=a>; rel="next"'),
        ("?n=2&last=a", ["c", "latest"], None),
        ("?n=4", ["B", "a", "c", "latest"], None),
        ("?n=100", ["B", "a", "c", "latest"], None),
        ("?n=0", [], None),
        ("?last=bb", ["c", "latest"], None),
        ("?last=zzz", [], None),
    ],
)
async def test_tags_come_in_pages(registry: Registry, query: str, tags: list[str], link: str | None) -> None:
    registry.images.known_tags = ("latest", "c", "a", "B", "a")
    response = await registry.get(f"/v2/git/tags/list{query}")
    assert response.json() == {"name": "git", "tags": tags}
    assert response.headers.get("link") == link


@pytest.mark.parametrize("n", ["-1", "two", "1.5", ""])
async def test_a_page_size_is_a_number(registry: Registry, n: str) -> None:
    response = await registry.get(f"/v2/git/tags/list?n={n}")
    assert response.status_code == 400
    assert oci_error(response)["code"] == "UNSUPPORTED"


async def test_following_the_links_gives_every_tag_once(registry: Registry) -> None:
    registry.images.known_tags = [f"{letter}.{number}" for letter in "aAbB" for number in range(5)]
    seen: list[str] = []
    path: str | None = "/v2/git/tags/list?n=3"
    while path:
        response = await registry.get(path)
        seen += response.json()["tags"]
        path = response.links.get("next", {}).get("url")
    assert sorted(seen) == sorted(registry.images.known_tags)
    assert seen == sorted(seen)


async def test_nothing_refers_to_a_manifest(registry: Registry) -> None:
    response = await registry.get(f"/v2/git/referrers/{MISSING}")
    assert response.headers["content-type"] == OCI_INDEX
    assert response.json() == {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    assert "oci-filters-applied" not in response.headers


async def test_a_filter_of_referrers_is_said_to_be_applied(registry: Registry) -> None:
    response = await registry.get(f"/v2/git/referrers/{MISSING}?artifactType=application/vnd.example.sbom.v1")
    assert response.headers["oci-filters-applied"] == "artifactType"
    assert response.json()["manifests"] == []
