"""A server that is killed at any moment starts again, and serves nothing but what is whole."""

import json
import random
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import httpx
import pytest

from chandlery.oci.digest import Digest
from tests.support.package_sets import SOURCE
from tests.support.servers import LIMIT, RunningServer, serving

KILLS = 15
PACKAGES = ["application", "assembly", "capital", "documentation", "greeter", "hello", "jq", "large"]
IMAGES = ["/".join(pair) for pair in combinations(PACKAGES, 2)]


def pull(url: str, image: str) -> None:
    """Pull an image as a client does that believes nothing: every digest and every size is checked."""
    with httpx.Client(base_url=f"{url}/v2/{image}/", timeout=LIMIT) as client:

        def get(path: str) -> bytes:
            response = client.get(path, follow_redirects=True).raise_for_status()
            assert Digest.parse(response.headers["docker-content-digest"]) == Digest.of(response.content)
            return response.content

        manifest = json.loads(get("manifests/latest"))
        for described in (manifest["config"], *manifest["layers"]):
            content = get(f"blobs/{described['digest']}")
            assert (described["digest"], described["size"]) == (str(Digest.of(content)), len(content))


def pull_until_killed(url: str, images: list[str]) -> None:
    with suppress(httpx.TransportError):
        for image in images:
            pull(url, image)


def broken_blobs(data_dir: Path) -> list[Path]:
    blobs = data_dir.glob("blobs/sha256/*/*")
    return [path for path in blobs if Digest.of(path.read_bytes()).hex != path.name]


def left_by_the_dead(data_dir: Path, server: RunningServer) -> list[Path]:
    """Return the temporary folders of processes that are no more; their names begin with the process's id."""
    alive = {str(number) for number in server.processes()}
    return [path for path in data_dir.glob("tmp/*") if path.name.partition("-")[0] not in alive]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """Return a file for what servers say; it is shown when a test fails."""
    file = tmp_path / "server.log"
    yield file
    sys.stdout.write(file.read_text())


@pytest.mark.parametrize("seed", [1])
def test_a_server_that_was_killed_needs_no_repair(tmp_path: Path, log: Path, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    data_dir = tmp_path / "data"
    with ThreadPoolExecutor() as threads:
        for _ in range(KILLS):
            with serving(data_dir, SOURCE, log) as server:
                assert not left_by_the_dead(data_dir, server)
                pulls = [
                    threads.submit(pull_until_killed, server.url, chance.sample(IMAGES, len(IMAGES)))
                    for _ in range(2)
                ]
                # The only thing here that has no reason to end at any particular time.
                threading.Event().wait(chance.uniform(0, 1))
                server.kill()
                for each in pulls:
                    each.result()
            assert not broken_blobs(data_dir)

    with serving(data_dir, SOURCE, log) as server:
        assert not left_by_the_dead(data_dir, server)
        for image in IMAGES:
            pull(server.url, image)
        assert not broken_blobs(data_dir)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT) == 0
    assert not list(data_dir.glob("tmp/*"))
    assert not list(data_dir.glob("*.broken"))
    assert "Traceback" not in log.read_text()
