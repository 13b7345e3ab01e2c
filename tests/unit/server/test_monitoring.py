import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.middleware import Middleware

from chandlery.access.client_address import parse_networks
from chandlery.builds.build import Build
from chandlery.builds.build_queue import QueueLimits
from chandlery.builds.images import Pulled
from chandlery.errors import BuildError, StorageFullError
from chandlery.image.name import NamePrefixes
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, Descriptor, Platform
from chandlery.registry import api as registry_api
from chandlery.server import monitoring
from chandlery.server.monitoring import Watchers, _tail
from chandlery.server.readiness import Readiness
from chandlery.server.request_log import RequestLog
from chandlery.telemetry.build_timings import Work
from chandlery.telemetry.metrics import Metrics
from tests.support.memory_blob_store import MemoryBlobStore
from tests.support.queues import WorkQueue, name_of
from tests.support.served_blobs import AsTheyAre

IMAGE = BuiltImage({}, Descriptor("", Digest.of(b""), 0), (), 0, 0)
LOOPBACK = parse_networks(["127.0.0.0/8", "::1"])


@dataclass
class Checks:
    """Two checks, of which one fails for the reason that is here."""

    problem: Exception | None = None

    async def passes(self) -> None: ...

    async def may_fail(self) -> None:
        if self.problem:
            raise self.problem


@dataclass
class Watched:
    """A server without images, with a queue that a test fills."""

    queue: WorkQueue
    app: Starlette
    checks: Checks = field(default_factory=Checks)

    def client(self, address: str = "127.0.0.1") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, client=(address, 1234))
        return httpx.AsyncClient(transport=transport, base_url="http://localhost:8080")

    async def get(self, path: str, address: str = "127.0.0.1", **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client(address) as client:
            return await client.get(path, headers=named)

    def building(
        self, image: str, work: Callable[[Build], Awaitable[BuiltImage]]
    ) -> "asyncio.Task[BuiltImage]":
        return asyncio.create_task(self.queue.ask(image, work, "client"))


@asynccontextmanager
async def watched(folder: Path, watchers: Watchers) -> AsyncIterator[Watched]:
    metrics, checks = Metrics(), Checks()
    async with WorkQueue(QueueLimits(running=1), folder / "builds") as queue:
        monitoring.count(metrics, queue, folder)
        readiness = Readiness({"storage": checks.may_fail, "nix": checks.passes}, max_age=0)

        class NoImages:
            async def pull(self, *_: object, index: bool, permission: object = None) -> Pulled:
                raise BuildError("nothing", "there is nothing here", [])

            async def tags(self, *_: object) -> list[str]:
                return []

            async def needs(self, *_: object) -> bool:
                return False

            async def is_current(self, *_: object, whole: bool) -> bool:
                return False

            max_age = 0.0

        routes = [
            *registry_api.routes(NoImages(), AsTheyAre(MemoryBlobStore()), NamePrefixes(Platform.of_host())),
            *monitoring.routes(metrics, readiness, queue, watchers),
        ]
        log = Middleware(RequestLog, metrics=metrics, trusted_proxies=watchers.trusted_proxies)
        app = Starlette(routes=routes, middleware=[log])
        yield Watched(queue, app, checks)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Watched]:
    async with watched(tmp_path, Watchers(LOOPBACK)) as server:
        yield server


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


# Alive and ready


async def test_a_process_that_answers_is_healthy(server: Watched) -> None:
    server.checks.problem = StorageFullError("/data")
    assert (await server.get("/healthz", "203.0.113.9")).status_code == 200


async def test_a_server_is_ready_when_every_check_is_passed(server: Watched) -> None:
    response = await server.get("/readyz")
    assert (response.status_code, response.json()) == (
        200,
        {"ready": True, "checks": {"storage": "ok", "nix": "ok"}},
    )


async def test_a_server_that_is_not_ready_says_why(server: Watched) -> None:
    server.checks.problem = StorageFullError("/data")
    response = await server.get("/readyz")
    assert response.status_code == 503
    assert response.json()["ready"] is False
    assert response.json()["checks"]["nix"] == "ok"
    assert "no space left" in response.json()["checks"]["storage"]


async def test_strangers_learn_whether_a_server_is_ready_and_not_why(server: Watched) -> None:
    server.checks.problem = StorageFullError("/data")
    response = await server.get("/readyz", "203.0.113.9")
    assert response.status_code == 503
    assert response.json()["checks"] == {"storage": "failed", "nix": "ok"}


# Figures


async def samples(server: Watched) -> dict[str, float]:
    text = (await server.get("/metrics")).text
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_requests_are_counted_by_what_they_are_for(server: Watched) -> None:
    digest = Digest.of(b"never put")
    for path in ("/v2/", f"/v2/git/blobs/{digest}", "/v2/git/manifests/latest", "/v2/x", "/elsewhere"):
        await server.get(path)
    counted = await samples(server)
    for route, status in (("base", 200), ("blob", 404), ("manifest", 422), ("unknown", 404), ("other", 404)):
        assert counted[f"chandlery_requests_total{sorted(['GET', route, str(status)])}"] == 1


async def test_names_that_clients_make_up_add_no_time_series(server: Watched) -> None:
    async def ask(words: list[str]) -> None:
        for word in words:
            await server.get(f"/v2/{word}/manifests/{word}")
            await server.get(f"/v2/{word}/tags/list")
            await server.get(f"/{word}")
            await server.get(f"/builds/{word}")

    await ask(["first"])
    await samples(server)
    before = set(await samples(server))
    await ask([f"word{number}" for number in range(20)])
    assert set(await samples(server)) == before


async def test_builds_queue_and_disk_are_shown(server: Watched) -> None:
    gate = asyncio.Event()

    async def work(build: Build) -> BuiltImage:
        build.step("pack")
        build.timings.add(Work.STORE, 1.0, 2.0)
        await gate.wait()
        if name_of(build) == "broken":
            raise BuildError("broken", "it is broken", [])
        return IMAGE

    tasks = [server.building(image, work) for image in ("first", "broken")]
    await until(lambda: server.queue.running == 1 and server.queue.queued == 1)
    shown = await samples(server)
    assert (shown["chandlery_running_builds[]"], shown["chandlery_queued_builds[]"]) == (1, 1)
    assert shown["chandlery_disk_used_bytes[]"] > 0
    assert shown["chandlery_disk_free_bytes[]"] > 0
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    shown = await samples(server)
    assert shown["chandlery_build_duration_seconds_count['finished']"] == 1
    assert shown["chandlery_build_duration_seconds_count['failed']"] == 1
    assert shown["chandlery_build_step_duration_seconds_count['queued']"] == 2
    assert shown["chandlery_build_step_duration_seconds_count['pack']"] == 2
    assert shown["chandlery_build_work_duration_seconds_sum['store']"] == 2
    assert (shown["chandlery_running_builds[]"], shown["chandlery_queued_builds[]"]) == (0, 0)


# Builds


async def test_builds_are_listed_with_their_state_and_place_in_the_queue(server: Watched) -> None:
    gate = asyncio.Event()

    async def work(build: Build) -> BuiltImage:
        build.step("resolve")
        await gate.wait()
        return IMAGE

    tasks = [server.building(image, work) for image in ("first", "second")]
    await until(lambda: any(build.timeline for build in server.queue.builds()))
    second, first = (await server.get("/builds")).json()
    assert [each["image"] for each in (first, second)] == ["first for linux/amd64", "second for linux/amd64"]
    assert (first["state"], first["position"], first["waiters"]) == ("running", 0, 1)
    assert (second["state"], second["position"]) == ("queued", 1)
    assert [each["step"] for each in first["timeline"]] == ["resolve"]
    gate.set()
    await asyncio.gather(*tasks)
    first = (await server.get(f"/builds/{first['id']}")).json()
    assert first["state"] == "finished"
    assert first["seconds"] == first["timeline"][-1]["seconds"]
    assert "error" not in first


async def test_a_build_that_failed_says_why(server: Watched) -> None:
    errors = {"expected": BuildError("git", "it is broken", []), "fault": ZeroDivisionError("a secret")}

    async def work(build: Build) -> BuiltImage:
        raise errors[name_of(build)]

    for image in errors:
        await asyncio.gather(server.building(image, work), return_exceptions=True)
    by_image = {build["image"].partition(" ")[0]: build for build in (await server.get("/builds")).json()}
    assert "it is broken" in by_image["expected"]["error"]
    assert "secret" not in by_image["fault"]["error"]


async def test_a_log_is_told_until_the_build_ends(server: Watched) -> None:
    gate = asyncio.Event()

    async def work(build: Build) -> BuiltImage:
        await gate.wait()
        build.log_file.write_text("building git\n")
        return IMAGE

    task = server.building("git", work)
    await until(lambda: server.queue.running == 1)
    (build,) = server.queue.builds()
    reading = asyncio.create_task(server.get(f"/builds/{build.id}/log"))
    gate.set()
    await task
    response = await reading
    assert response.text == "building git\n"
    assert response.headers["content-type"].startswith("text/plain")


async def test_a_log_is_told_as_it_grows(tmp_path: Path) -> None:
    file, ended = tmp_path / "log", False
    told = _tail(file, lambda: ended)
    first = asyncio.ensure_future(anext(told))
    await asyncio.sleep(0)
    file.write_text("one\n")
    assert await first == b"one\n"
    with file.open("a") as log:
        log.write("two\n")
    assert await anext(told) == b"two\n"
    ended = True
    assert [part async for part in told] == []


async def test_the_logs_of_an_earlier_process_can_still_be_read(server: Watched) -> None:
    earlier = "20240101-120000-0123abcd"
    server.queue.log_file(earlier).write_text("built long ago\n")
    assert (await server.get(f"/builds/{earlier}/log")).text == "built long ago\n"


@pytest.mark.parametrize(
    "path", ["/builds/x", "/builds/x/log", "/builds/20240101-120000-0123abcd/log", "/builds/..%2Fsecret/log"]
)
async def test_a_build_that_is_not_known_is_not_found(server: Watched, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.log").write_text("a secret")
    response = await server.get(path)
    assert response.status_code == 404
    assert "secret" not in response.text


# Who may look


PRIVATE = ["/metrics", "/builds", "/builds/20240101-120000-0123abcd/log"]


@pytest.mark.parametrize("path", PRIVATE)
async def test_figures_and_builds_are_for_the_networks_in_the_settings(server: Watched, path: str) -> None:
    for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert (await server.get(path, address)).status_code != 403
    for address in ("203.0.113.9", "2001:db8::1", "no address"):
        response = await server.get(path, address)
        assert response.status_code == 403
        assert "metrics_networks" in response.json()["error"]


ONE_PROXY = parse_networks(["10.0.0.1"])


@pytest.mark.parametrize(
    ("peer", "forwarded", "admitted"),
    [
        ("10.0.0.1", {"x_forwarded_for": "127.0.0.1"}, True),
        ("10.0.0.1", {"x_forwarded_for": "127.0.0.1, 203.0.113.9"}, False),
        ("10.0.0.1", {"x_forwarded_for": "203.0.113.9"}, False),
        ("10.0.0.1", {"x_forwarded_for": "unknown"}, False),
        ("10.0.0.1", {"via": "1.1 proxy"}, False),
        ("10.0.0.1", {}, False),
        # A proxy on this machine that nobody has told of: everybody comes from here.
        ("127.0.0.1", {"x_forwarded_for": "203.0.113.9"}, False),
        ("127.0.0.1", {"x_forwarded_for": "127.0.0.1"}, False),
        ("127.0.0.1", {"forwarded": "for=203.0.113.9"}, False),
        ("127.0.0.1", {"x_real_ip": "203.0.113.9"}, False),
        ("127.0.0.1", {}, True),
    ],
)
async def test_who_comes_through_a_proxy_is_whom_a_trusted_one_names(
    tmp_path: Path, peer: str, forwarded: dict[str, Any], admitted: bool
) -> None:
    async with watched(tmp_path, Watchers(LOOPBACK, ONE_PROXY)) as server:
        response = await server.get("/metrics", peer, **forwarded)
    assert (response.status_code == 200) == admitted


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:8080"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"host": "localhost"}, 200),
        # A proxy or a forwarded port that adds no header: all the world comes from this machine.
        ({"host": "registry.example.com"}, 403),
        ({"host": "registry.example.com:8080"}, 403),
        # A page in a browser on this machine: its name leads here (DNS rebinding), or it asks across origins.
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:8080"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
    ],
)
@pytest.mark.parametrize("path", ["/builds", "/metrics"])
async def test_who_asks_this_machine_for_something_else_is_no_watcher(
    server: Watched, path: str, headers: Mapping[str, str], status: int
) -> None:
    assert (await server.get(path, **headers)).status_code == status


async def test_another_network_may_call_the_server_as_it_is_called_there(tmp_path: Path) -> None:
    async with watched(tmp_path, Watchers(parse_networks(["10.0.0.0/8"]))) as server:
        assert (await server.get("/metrics", "10.1.2.3", host="registry.example.com")).status_code == 200
        evil = {"host": "registry.example.com", "origin": "http://evil.example"}
        assert (await server.get("/metrics", "10.1.2.3", **evil)).status_code == 403
