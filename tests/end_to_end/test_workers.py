"""A server with several workers: to clients and to whoever watches it is one."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.package_sets import SOURCE, Gates
from tests.support.servers import LIMIT, RunningServer, serving

CLIENTS = 50
IMAGE = "/v2/waiting-a/manifests/latest"
WORKERS = {"CHANDLERY_WORKERS": "2"}


@pytest.fixture
def gates(tmp_path: Path) -> Gates:
    (tmp_path / "data").mkdir()
    return Gates(tmp_path / "gates", tmp_path / "data")


@pytest.fixture
def server(tmp_path: Path, gates: Gates) -> Iterator[RunningServer]:
    with serving(tmp_path / "data", SOURCE, tmp_path / "log", variables=WORKERS) as running:
        yield running


async def pull(server: RunningServer) -> httpx.Response | None:
    """Pull over a connection of its own, so that any worker may get it; None if that worker dies."""
    async with httpx.AsyncClient(base_url=server.url, timeout=LIMIT, follow_redirects=True) as client:
        try:
            return await client.get(IMAGE)
        except httpx.TransportError:
            return None


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110 (logs and processes have no events)
            await asyncio.sleep(0.01)


def workers(server: RunningServer) -> set[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return {int(child) for child in children}


def builder(data_dir: Path) -> int:
    """Return the worker that builds: what it keeps from Nix's collector is in a folder with its number."""
    (roots,) = data_dir.glob("tmp/*/20*")
    return int(roots.parent.name.partition("-")[0])


def builds(server: RunningServer) -> list[Any]:
    listed: list[Any] = server.get("/builds").json()
    return listed


def counted(server: RunningServer, name: str, **labels: str) -> float:
    """Add up a figure's samples with these labels, as whichever worker gets the question tells them."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def test_many_clients_of_all_workers_get_one_build(
    tmp_path: Path, server: RunningServer, gates: Gates
) -> None:
    assert len(workers(server)) == 2
    pulls = [asyncio.create_task(pull(server)) for _ in range(CLIENTS)]
    await gates.reached("waiting-a")
    await until(lambda: "another process builds it" in server.log.read_text())
    # What is told by whoever is asked is told by all, after a moment.
    await until(lambda: all(len(builds(server)) == 1 for _ in range(10)))
    assert counted(server, "chandlery_running_builds") == 1
    (build,) = builds(server)
    assert all(server.get(f"/builds/{build['id']}").json()["state"] == "running" for _ in range(10))
    gates.open("waiting-a")
    digests = {each.headers["docker-content-digest"] for each in await asyncio.gather(*pulls) if each}
    assert len(digests) == 1
    assert len(list(tmp_path.glob("data/builds/*.log"))) == 1
    assert server.log.read_text().count("build finished") == 1

    answers = {"route": "manifest", "method": "GET", "status": "200"}
    await until(lambda: counted(server, "chandlery_requests_total", **answers) == CLIENTS)
    assert counted(server, "chandlery_build_duration_seconds_count", state="finished") == 1
    assert all(server.get(path).is_success for path in ("/healthz", "/readyz") for _ in range(5))

    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(LIMIT) == 0
    assert not server.processes()
    assert not list(tmp_path.glob("data/tmp/*"))
    assert not (tmp_path / "data" / "running").exists()


async def test_when_the_worker_that_builds_is_killed_another_one_finishes_it(
    tmp_path: Path, server: RunningServer, gates: Gates
) -> None:
    pulls = [asyncio.create_task(pull(server)) for _ in range(20)]
    await gates.reached("waiting-a")
    await until(lambda: "another process builds it" in server.log.read_text())
    killed = builder(tmp_path / "data")
    os.kill(killed, signal.SIGKILL)
    await until(lambda: server.log.read_text().count("build queued") == 2)
    # Its Nix lives on, and the next one waits for that.
    gates.open("waiting-a")
    answers = await asyncio.gather(*pulls)
    assert {each.status_code for each in answers if each} == {200}
    # And there are two again.
    await until(lambda: len(workers(server)) == 2 and killed not in workers(server))
    assert server.log.read_text().count("build finished") == 1


async def test_what_a_killed_worker_was_building_is_built_though_nobody_waits(
    tmp_path: Path, server: RunningServer, gates: Gates
) -> None:
    asked = asyncio.create_task(pull(server))
    await gates.reached("waiting-a")
    os.kill(builder(tmp_path / "data"), signal.SIGKILL)
    assert await asked is None
    await until(lambda: "a build is taken over" in server.log.read_text())
    gates.open("waiting-a")
    await until(lambda: "build finished" in server.log.read_text())
    await until(lambda: not list(tmp_path.glob("data/builds/*.unfinished")))


def killed(server: RunningServer) -> int:
    """Kill a worker; give its number."""
    worker = min(workers(server))
    os.kill(worker, signal.SIGKILL)
    return worker


async def test_a_worker_that_starts_later_plans_as_the_others_do(tmp_path: Path, gates: Gates) -> None:
    table = tmp_path / "popularity.json"
    table.write_text('{"part-1": 5}')
    variables = {**WORKERS, "CHANDLERY_POPULARITY": str(table)}
    with serving(tmp_path / "data", SOURCE, tmp_path / "log", variables=variables) as server:
        path = "/v2/assembly/manifests/latest"
        digest = server.get(path).headers["docker-content-digest"]
        table.write_text('{"part-2": 5}')
        gone = killed(server)
        await until(lambda: gone not in workers(server) and len(workers(server)) == 2)
        await until(server.answers)
        assert {server.get(path).headers["docker-content-digest"] for _ in range(16)} == {digest}


async def test_a_worker_that_can_not_start_ends_no_other(tmp_path: Path, gates: Gates) -> None:
    users = tmp_path / "users"
    # The password of nobody.
    users.write_text(f"nobody:$2y$04${'.' * 53}\n")
    variables = {**WORKERS, "CHANDLERY_USERS_FILE": str(users), "CHANDLERY_ANONYMOUS": "read"}
    variables["CHANDLERY_PUBLIC_URL"] = "http://127.0.0.1"
    log = tmp_path / "log"
    with serving(tmp_path / "data", SOURCE, log, variables=variables) as server:
        # Both have started: each has told the other what it does.
        await until(lambda: len(list(tmp_path.glob("data/tmp/*/*.report"))) == 2)
        users.rename(tmp_path / "away")
        gone = killed(server)
        await until(lambda: "a worker can't start" in log.read_text())
        assert str(users) in log.read_text()
        first = workers(server)
        assert gone not in first
        # When it has died another one starts; meanwhile connections that it had may be lost.
        await until(lambda: len(workers(server) | first) == 3)
        await until(server.answers)
