"""Many clients at once, and clients that are in nobody's interest."""

import asyncio
import itertools
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from chandlery.oci.digest import Digest
from chandlery.oci.documents import OCI_MANIFEST
from tests.support.package_sets import SOURCE, Gates
from tests.support.servers import RunningServer, serving

_PACKAGES = ("hello", "jq", "greeter", "capital", "application", "assembly", "suite", "documentation")
# Bytes, for the server and all of its helpers; what 50 small images take in memory is far less.
_MOST_MEMORY = 600 << 20
_LIMIT = 120.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    # Uncompressed, so that a blob is larger than what sockets buffer.
    variables = {"CHANDLERY_QUEUED_BUILDS": "100", "CHANDLERY_COMPRESSION": "none"}
    with serving(tmp_path / "data", SOURCE, tmp_path / "server.log", variables=variables) as running:
        yield running


@asynccontextmanager
async def clients(server: RunningServer, connections: int) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=connections)
    timeout = httpx.Timeout(_LIMIT)
    async with httpx.AsyncClient(
        base_url=server.url, limits=limits, timeout=timeout, follow_redirects=True
    ) as client:
        yield client


async def pull(client: httpx.AsyncClient, name: str) -> str:
    """Pull an image as a client with nothing in its cache does; give the manifest's digest."""
    response = await client.get(f"/v2/{name}/manifests/latest", headers={"accept": OCI_MANIFEST})
    assert response.status_code == 200, response.text
    manifest = response.json()
    for descriptor in (manifest["config"], *manifest["layers"]):
        blob = await client.get(f"/v2/{name}/blobs/{descriptor['digest']}")
        assert str(Digest.of(blob.content)) == descriptor["digest"]
    digest = str(Digest.of(response.content))
    assert response.headers["docker-content-digest"] == digest
    return digest


def memory(server: RunningServer) -> int:
    """Return the most memory that any of the server's processes has held, summed up, in bytes."""
    total = 0
    for number in server.processes():
        match = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{number}/status").read_text(), re.MULTILINE)
        total += int(match[1]) * 1024 if match else 0
    return total


async def test_200_clients_pull_one_new_image_and_it_is_built_once(server: RunningServer) -> None:
    async with clients(server, 200) as client:
        digests = await asyncio.gather(*(pull(client, "assembly/greeter") for _ in range(200)))
    assert len(set(digests)) == 1
    assert server.log.read_text().count("build queued") == 1
    print(f"clients that pulled one new image at once: {len(digests)}, builds: 1")  # noqa: T201


async def test_50_clients_pull_50_images_and_memory_stays_bounded(server: RunningServer) -> None:
    mixes = [mix for size in (1, 2, 3) for mix in itertools.combinations(_PACKAGES, size)][:50]
    async with clients(server, 50) as client:
        digests = await asyncio.gather(*(pull(client, "/".join(mix)) for mix in mixes))
    assert len(set(digests)) == 50
    assert server.log.read_text().count("build finished") == 50
    used = memory(server)
    assert used < _MOST_MEMORY
    print(f"images that 50 clients pulled at once: 50, most memory of all processes: {used >> 20} MiB")  # noqa: T201


async def test_clients_that_say_nothing_or_read_nothing_do_not_stop_others(server: RunningServer) -> None:
    async with clients(server, 10) as client:
        await pull(client, "large")
        manifest = (await client.get("/v2/large/manifests/latest")).json()
        largest = max(manifest["layers"], key=lambda layer: int(layer["size"]))["digest"]
        host, port = server.url.removeprefix("http://").split(":")
        with ExitStack() as open_sockets:
            silent = (b"", b"GET /v2/large/manifests/", b"GET /v2/ HTTP/1.1\r\nHost: here\r\nX-Slow: ")
            unread = f"GET /v2/large/blobs/{largest} HTTP/1.1\r\nHost: here\r\n\r\n".encode()
            for request in itertools.islice(itertools.cycle((*silent, unread)), 400):
                connection = open_sockets.enter_context(socket.create_connection((host, int(port))))
                connection.sendall(request)
            async with asyncio.timeout(_LIMIT):
                assert await pull(client, "large")
                assert await pull(client, "hello/jq")
    print("connections held by clients that say or read nothing: 400")  # noqa: T201


async def test_a_client_that_fills_slots_and_queue_stops_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Gates(tmp_path / "gates", tmp_path / "data")
    variables = {
        "CHANDLERY_PARALLEL_BUILDS": "2",
        "CHANDLERY_QUEUED_BUILDS": "2",
        "CHANDLERY_HOLD": "0.5",
        "CHANDLERY_TRUSTED_PROXIES": "127.0.0.1",
    }
    with serving(tmp_path / "data", SOURCE, tmp_path / "server.log", variables=variables) as server:
        greedy = {"x-forwarded-for": "203.0.113.66"}
        modest = {"x-forwarded-for": "2001:db8::1"}
        async with clients(server, 20) as client:

            async def ask(name: str, who: dict[str, str], *, once: bool = False) -> httpx.Response:
                path = f"/v2/{name}/manifests/latest"
                return await client.get(path, headers=who, follow_redirects=not once)

            # Their builders wait for a gate that nobody opens; half of the requests are left.
            mixes = ["waiting-a", *(f"waiting-a/{each}" for each in _PACKAGES[:6])]
            asked = [
                asyncio.create_task(ask(mix, greedy, once=number > 3)) for number, mix in enumerate(mixes)
            ]
            await asyncio.gather(*asked[4:])
            for name in ("hello", "jq"):
                assert (await ask(name, modest)).status_code == 200
            refused = [each for each in await asyncio.gather(*asked) if each.status_code != 307]
            assert {each.status_code for each in refused} == {429}
            assert all(int(each.headers["retry-after"]) > 0 for each in refused)
