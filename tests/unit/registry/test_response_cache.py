"""Answers from memory: they are what they would be without it, and as new."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from chandlery.access.client_address import parse_networks
from chandlery.access.control import AccessControl
from chandlery.access.public_address import PublicAddress
from chandlery.access.rules import AccessRules
from chandlery.errors import BuildError, ChandleryError, SourceUnavailableError
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    DOCKER_MANIFEST,
    DOCKER_MANIFEST_LIST,
    INDEX_MEDIA_TYPE,
    OCI_INDEX,
    OCI_MANIFEST,
    ManifestFormat,
    Platform,
    image_index,
)
from chandlery.registry.api import Access, routes
from chandlery.registry.response_cache import CachedResponse, ResponseCache, keep
from chandlery.server.request_log import RequestLog
from chandlery.telemetry.metrics import Metrics
from tests.support.memory_blob_store import MemoryBlobStore
from tests.support.one_image import HOST, LAYER, MISSING, OneImage, one_image
from tests.support.samples import values
from tests.support.served_blobs import AsTheyAre


@dataclass
class Application:
    """Answers every request with the number of requests that have come so far."""

    check: Callable[[], Any]
    lifetime: float = 0.0
    calls: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        response = CachedResponse(
            str(self.calls).encode(), {"x-test": "yes"}, "text/plain", self.check, self.lifetime
        )
        keep(scope, response)
        await response(scope, receive, send)


@dataclass
class Check:
    """Says what it is told to, and when."""

    holds: bool = True
    error: Exception | None = None
    calls: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self) -> bool:
        self.calls += 1
        self.begun.set()
        await self.gate.wait()
        if self.error:
            raise self.error
        return self.holds


@pytest.fixture
def check() -> Check:
    check = Check()
    check.gate.set()
    return check


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://registry")


async def test_the_same_request_is_answered_from_memory(check: Check) -> None:
    app = Application(check)
    async with client_of(ResponseCache(app)) as client:
        first, second = await client.get("/a"), await client.get("/a")
    assert (first.text, second.text, app.calls, check.calls) == ("1", "1", 1, 1)
    assert second.headers == first.headers


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("HEAD", "/a", {}),
        ("POST", "/a", {}),
        ("GET", "/b", {}),
        ("GET", "/a?ns=docker.io", {}),
        ("GET", "/a", {"accept": OCI_MANIFEST}),
        ("GET", "/a", {"if-none-match": '"x"'}),
        ("GET", "/a", {"if-match": '"x"'}),
        ("GET", "/a", {"range": "bytes=0-0"}),
        ("GET", "/a", {"authorization": "Bearer x"}),
    ],
)
async def test_another_request_is_not(
    check: Check, method: str, path: str, headers: Mapping[str, str]
) -> None:
    app = Application(check)
    async with client_of(ResponseCache(app)) as client:
        await client.get("/a")
        await client.request(method, path, headers=headers)
    assert app.calls == 2


@pytest.mark.parametrize("error", [None, SourceUnavailableError("git", "no route"), ZeroDivisionError()])
async def test_what_holds_no_longer_is_made_anew(check: Check, error: Exception | None) -> None:
    app = Application(check)
    async with client_of(ResponseCache(app)) as client:
        await client.get("/a")
        check.holds, check.error = False, error
        with capture_logs() as events:
            assert (await client.get("/a")).text == "2"
        check.holds, check.error = True, None
        assert (await client.get("/a")).text == "2"
    expected = error is not None and not isinstance(error, ChandleryError)
    assert [event["log_level"] for event in events] == ["error"] * expected


async def test_a_check_is_for_all_who_came_before_it_and_for_nobody_who_came_later(check: Check) -> None:
    app = Application(check)
    async with client_of(ResponseCache(app)) as client:
        await client.get("/a")
        check.gate.clear()
        check.begun.clear()
        early = asyncio.create_task(client.get("/a"))
        await check.begun.wait()
        late = [asyncio.create_task(client.get("/a")) for _ in range(5)]
        await asyncio.sleep(0)
        assert check.calls == 1
        late[0].cancel()  # disturbs nobody else
        check.gate.set()
        assert {(await each).text for each in (early, *late[1:])} == {"1"}
    assert (app.calls, check.calls) == (1, 2)


async def test_what_was_checked_a_moment_ago_is_not_checked_again(check: Check) -> None:
    app = Application(check, lifetime=3600.0)
    async with client_of(ResponseCache(app)) as client:
        for _ in range(3):
            assert (await client.get("/a")).text == "1"
    assert check.calls == 0


async def test_a_check_that_takes_long_is_not_waited_for(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chandlery.registry.response_cache._LONGEST_CHECK", 0.01)
    async with client_of(ResponseCache(Application(check))) as client:
        await client.get("/a")
        check.gate.clear()
        assert (await client.get("/a")).text == "2"


async def test_what_is_in_memory_has_a_limit(check: Check) -> None:
    answers = ResponseCache(Application(check), most=10_000)
    async with client_of(answers) as client:
        for number in range(100):
            await client.get(f"/{number}", headers={"accept": "x" * number})
        assert 0 < answers.size <= 10_000
        assert (await client.get("/99", headers={"accept": "x" * 99})).text == "100"
        assert (await client.get("/0", headers={"accept": ""})).text == "101"
        before = answers.size
        await client.get("/large", headers={"accept": "x" * 10_000})
        assert answers.size == before


async def test_a_response_that_says_nothing_of_it_is_not_kept() -> None:
    calls = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        response = Response("hello")
        keep(scope, response)
        await response(scope, receive, send)

    async with client_of(ResponseCache(app)) as client:
        await client.get("/a")
        await client.get("/a")
    assert calls == 2


# The registry


@dataclass
class Registry:
    """One registry twice: with and without answers from memory."""

    images: OneImage
    fast: httpx.AsyncClient
    slow: httpx.AsyncClient
    metrics: Metrics
    names: Mapping[str, str]

    async def both(self, method: str, path: str, headers: Mapping[str, str]) -> httpx.Response:
        """Ask both, the fast one twice; their answers are the same to the byte."""
        url = path.format(**self.names)
        named = {name: value.format(**self.names) for name, value in headers.items()}
        named["x-request-id"] = "the-same"
        slow = await self.slow.request(method, url, headers=named)
        for _ in range(2):
            fast = await self.fast.request(method, url, headers=named)
            assert (fast.status_code, fast.content) == (slow.status_code, slow.content)
            assert fast.headers.raw == slow.headers.raw
        return slow


@asynccontextmanager
async def registry(control: AccessControl | None = None, max_age: float = 0.0) -> AsyncIterator[Registry]:
    blobs = MemoryBlobStore()
    images = OneImage(await one_image(blobs), max_age=max_age)
    manifests = images.image_.manifests
    images.index = {
        each: await blobs.put_bytes(
            image_index(each, [(Platform("linux", "arm64"), manifests[each])]), media_type
        )
        for each, media_type in INDEX_MEDIA_TYPE.items()
    }
    api, metrics = routes(images, AsTheyAre(blobs), HOST, Access(control=control)), Metrics()
    # Who asks may say which id its request has.
    proxies = parse_networks(["127.0.0.1"])
    log = Middleware(RequestLog, metrics=metrics, trusted_proxies=proxies)
    fast = Starlette(routes=api, middleware=[log, Middleware(ResponseCache)])
    slow = Starlette(routes=api, middleware=[Middleware(RequestLog, trusted_proxies=proxies)])
    names = {
        "manifest": str(manifests[ManifestFormat.OCI].digest),
        "docker": str(manifests[ManifestFormat.DOCKER].digest),
        "index": str(images.index[ManifestFormat.OCI].digest),
        "layer": str(Digest.of(LAYER)),
        "missing": str(MISSING),
    }
    async with client_of(fast) as fast_client, client_of(slow) as slow_client:
        yield Registry(images, fast_client, slow_client, metrics, names)


ACCEPTS = ["*/*", OCI_MANIFEST, DOCKER_MANIFEST, f"{OCI_MANIFEST}, {OCI_INDEX}", DOCKER_MANIFEST_LIST, "x/y"]
CONDITIONS: list[dict[str, str]] = [
    {},
    {"if-none-match": '"{manifest}"'},
    {"if-none-match": '"{missing}"'},
    {"if-none-match": "*"},
    {"if-match": '"{manifest}"'},
    {"if-match": '"{missing}"'},
    {"range": "bytes=0-9"},
    {"authorization": "Basic YTpi"},
]
PATHS = [
    *("/v2/git/manifests/latest", "/v2/git/manifests/latest?ns=docker.io", "/v2/git/manifests/.x"),
    *("/v2/git/manifests/{manifest}", "/v2/git/manifests/{docker}", "/v2/git/manifests/{index}"),
    *("/v2/git/manifests/{layer}", "/v2/git/manifests/{missing}", "/v2/Git/manifests/latest"),
    *("/v2/git/blobs/{layer}", "/v2/git/blobs/{manifest}", "/v2/git/tags/list", "/v2/", "/v2/x"),
]


@pytest.mark.parametrize("max_age", [0.0, 3600.0])
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
@pytest.mark.parametrize("warnings", [(), ("the mirror is dead",)])
async def test_answers_are_the_same_with_and_without(
    method: str, max_age: float, warnings: tuple[str, ...]
) -> None:
    async with registry(max_age=max_age) as both:
        both.images.warnings = warnings
        for path in PATHS:
            for accept in ACCEPTS:
                for condition in CONDITIONS:
                    await both.both(method, path, {"accept": accept, **condition})


@pytest.mark.parametrize("reference", ["latest", "{manifest}"])
async def test_a_manifest_is_given_again_from_memory_counted_and_logged(reference: str) -> None:
    async with registry() as both:
        path = f"/v2/git/manifests/{reference}".format(**both.names)
        await both.fast.get(path)
        pulls = len(both.images.requests)
        with capture_logs() as events:
            response = await both.fast.get(path, headers={"x-request-id": "mine"})
        assert len(both.images.requests) == pulls
        counted = values(both.metrics)
    assert response.headers["x-request-id"] == "mine"
    assert counted["chandlery_requests_total", "GET", "manifest", "200"] == 2
    assert counted["chandlery_response_bytes_total", "manifest"] == 2 * len(response.content)
    (event,) = events
    assert (event["event"], event["status"], event["request_id"]) == ("request", 200, "mine")
    assert event["bytes"] == len(response.content)


async def test_a_tag_that_moves_is_seen_at_once() -> None:
    async with registry(max_age=3600.0) as both:
        await both.both("GET", "/v2/git/manifests/latest", {})
        both.images.image_ = replace(both.images.image_, manifests=both.images.index)
        response = await both.both("GET", "/v2/git/manifests/latest", {})
        assert response.headers["docker-content-digest"] == both.names["index"]
        both.images.error = BuildError("git", "exit code 1", [])
        assert (await both.fast.get("/v2/git/manifests/latest")).status_code == 422


async def test_access_is_decided_each_time() -> None:
    rules = AccessRules.model_validate({"default": {"requests_per_minute": 2}})
    control = AccessControl(rules, {"": ("debian!bookworm",)}, PublicAddress("", ()))
    async with registry(control, max_age=3600.0) as both:
        for reference in ("latest", both.names["manifest"]):
            await both.fast.get(f"/v2/git/manifests/{reference}")
        response = await both.fast.get("/v2/git/manifests/latest")
        assert response.status_code == 429
