"""Thousands of generated requests to the real server: every one gets a proper answer in time.

They go over the wire byte by byte, so that no client's library makes them better than they are.
"""

import json
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from chandlery.oci.digest import Digest
from tests.support.generated_requests import FORGED, Request, broken_requests, requests
from tests.support.package_sets import SOURCE, Gates
from tests.support.running import require
from tests.support.servers import RunningServer, serving

WELL_FORMED = 4000
BROKEN = 1000
# So many are under way at once.
CLIENTS = 8
# Seconds in which a request is answered. A build may begin for it, but nobody is held for more than a moment.
DEADLINE = 20.0
# Seconds in which more may come after what may be the beginning of something.
PATIENCE = 0.2
# Bytes by which the server's memory may grow over all of them.
GROWTH = 64 << 20

# How granian itself refuses what isn't HTTP as it wants it, with no body; the application never sees such a
# request. 400: a head that can't be parsed, 414: a path of more than 64 KB, 431: too much of a head.
GRANIAN_REFUSES_WITH = {400, 414, 431}

# What has to be among the answers, for the requests to be worth sending.
EXPECTED = {"200", "206", "304", "307", "400", "403", "404", "405", "412", "416"}
CODES = {
    *("BLOB_UNKNOWN", "DIGEST_INVALID", "MANIFEST_UNKNOWN", "NAME_INVALID", "UNSUPPORTED", "TOOMANYREQUESTS"),
}
SECRET = b"canary-of-the-tests"
# The same requests each time, so that a run that fails can be repeated.
DETERMINED = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)


T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A server with one image, and files in and around its data that nobody must ever see."""

    server: RunningServer
    folder: Path
    manifest: bytes  # of hello:latest
    digests: tuple[str, ...]  # of that, of its config and of its layers

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.server.url)
        return str(parts.hostname), int(parts.port or 0)

    def files(self) -> dict[str, bytes]:
        """Return what stands around the data and at its top, and the content of the canaries."""
        around = {str(path): b"" for path in (*self.folder.iterdir(), *(self.folder / "data").iterdir())}
        return around | {str(path): path.read_bytes() for path in self.folder.rglob("canary")}

    def memory(self) -> int:
        """Return the memory of the server's process in bytes."""
        figures = self.server.get("/metrics").text
        found = re.search(r"^process_resident_memory_bytes (\S+)$", figures, re.MULTILINE)
        assert found
        return int(float(found[1]))


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    require("nix", root=False)
    data = tmp_path / "data"
    Gates(tmp_path / "gates", data)
    for folder in (tmp_path, data, data / "blobs", data / "blobs" / "sha256"):
        folder.mkdir(exist_ok=True)
        (folder / "canary").write_bytes(SECRET)
    variables = {
        "CHANDLERY_HOLD": "0.05",
        "CHANDLERY_FAILURE_MEMORY": "600",
        # So that what generated requests say about proxies is read at all.
        "CHANDLERY_TRUSTED_PROXIES": '["127.0.0.1"]',
    }
    with serving(data, SOURCE, tmp_path / "log", variables=variables) as server:
        response = server.get("/v2/hello/manifests/latest")
        while not response.is_success:
            response = server.get("/v2/hello/manifests/latest")
        image = response.json()
        blobs = [blob["digest"] for blob in (image["config"], *image["layers"])]
        yield Target(server, tmp_path, response.content, (str(Digest.of(response.content)), *blobs))


@dataclass(frozen=True)
class Answer:
    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def is_of_the_application(self) -> bool:
        return "x-request-id" in self.headers


def ask(target: Target, request: Request) -> Answer:
    """Send a request, and read the whole answer."""
    with socket.create_connection(target.address, DEADLINE) as connection:
        # It may be refused before it was read to its end; the answer says so.
        with suppress(ConnectionError):
            connection.sendall(request.content)
        response = HTTPResponse(connection, method=request.method)
        response.begin()
        return Answer(response.status, httpx.Headers(response.getheaders()), response.read())


def send(target: Target, content: bytes) -> bytes:
    """Send bytes, and give whatever comes until the server closes the connection."""
    received = b""
    with socket.create_connection(target.address, DEADLINE) as connection, suppress(ConnectionError):
        connection.sendall(content)
        connection.settimeout(PATIENCE)
        try:
            while part := connection.recv(1 << 16):
                received += part
        except TimeoutError:
            # It waits for more, and that's its right; when nothing more can come, it has to go.
            connection.settimeout(DEADLINE)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                received += part
    return received


def check(target: Target, request: Request, answer: Answer) -> None:
    """Raise unless an answer is a proper one."""
    assert answer.status < 500
    assert SECRET not in answer.body
    assert b"root:x:0:0:" not in answer.body
    if not answer.is_of_the_application:
        assert answer.status in GRANIAN_REFUSES_WITH
        assert answer.body == b""
    elif request.is_of_the_api:
        assert answer.headers["docker-distribution-api-version"] == "registry/2.0"
        if answer.status >= 400:
            assert answer.headers["content-type"] == "application/json"
            if request.method != "HEAD":
                check_error(answer)
        elif answer.status == 200 and "docker-content-digest" in answer.headers and request.method == "GET":
            assert answer.headers["docker-content-digest"] == str(Digest.of(answer.body))


def check_error(answer: Answer) -> None:
    (error,) = json.loads(answer.body)["errors"]
    assert error["code"] in CODES
    assert error["message"]
    assert error["detail"]["request_id"] == answer.headers["x-request-id"]


def generated(strategy: SearchStrategy[T], count: int) -> list[T]:
    """Draw so many from a strategy, the same ones every time."""
    drawn: list[T] = []

    @settings(DETERMINED, max_examples=count)
    @given(strategy)
    def draw(each: T) -> None:
        drawn.append(each)

    draw()
    return drawn


def side_by_side(send_one: Callable[[T], str], requests: Sequence[T]) -> list[str]:
    """Send each; give what became of it. What goes wrong is raised with the request in it."""

    def send_and_name(request: T) -> str:
        try:
            return send_one(request)
        except Exception as error:
            error.add_note(f"the request was {request!r}")
            raise

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(send_and_name, requests))


def test_any_request_gets_a_proper_answer(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    files, memory = target.files(), target.memory()
    seen: Counter[str] = Counter()

    def well_formed(request: Request) -> str:
        answer = ask(target, request)
        check(target, request, answer)
        return f"{answer.status}{'' if answer.is_of_the_application else ' by granian'}"

    def broken(content: bytes) -> str:
        received = send(target, content)
        assert SECRET not in received
        assert all(int(status) < 500 for status in re.findall(rb"HTTP/1\.[01] (\d{3})", received))
        return "broken"

    seen.update(side_by_side(well_formed, generated(requests(target.digests), WELL_FORMED)))
    seen.update(side_by_side(broken, generated(broken_requests(target.digests), BROKEN)))

    grown = target.memory() - memory
    with capsys.disabled():
        print(f"\n{seen.total()} generated requests: {dict(sorted(seen.items()))}; {grown >> 20} MB more")  # noqa: T201
    assert set(seen) >= EXPECTED
    assert grown < GROWTH
    assert target.files() == files
    assert target.server.get("/v2/hello/manifests/latest").content == target.manifest
    for digest in target.digests[1:]:
        assert str(Digest.of(target.server.get(f"/v2/hello/blobs/{digest}").content)) == digest
    log = target.server.log.read_text(errors="replace")
    assert "request failed" not in log
    assert "Traceback" not in log
    assert not [line for line in log.split("\n") if line.startswith(FORGED)]
    assert not set(log) & {"\x1b", "\x9b", "\x7f", "\u202e"}, "what a client sends drives the terminal"
