"""The real server with a tiny disk limit, with blobs that break, and with crashes: whoever pulls gets all."""

import itertools
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from chandlery.demo.registry_client import PullError, pull
from chandlery.oci.digest import Digest
from tests.support.damage import cut, flip, lose
from tests.support.package_sets import SOURCE
from tests.support.servers import LIMIT, RunningServer, serving, wait_until

# How long pulls and collection run against each other, in seconds.
SECONDS = float(os.environ.get("CHANDLERY_TEST_SECONDS", "45"))
CLIENTS = 6
NAMES = [
    *("hello", "jq", "greeter", "suite", "documentation", "assembly", "application", "capital", "large"),
    *("hello/jq", "greeter/suite", "shell/hello", "shell/jq", "library.dev", "tools.wrench", "assembly/jq"),
]
# All images together are many times that; half of it is one image.
DISK_LIMIT = 40_000


@contextmanager
def running(folder: Path, **settings: object) -> Iterator[RunningServer]:
    variables = {f"CHANDLERY_{name.upper()}": str(value) for name, value in settings.items()}
    with serving(folder / "data", SOURCE, folder / "server.log", variables=variables) as server:
        yield server


def blob_file(folder: Path, digest: Digest | str) -> Path:
    hexadecimal = str(digest).removeprefix("sha256:")
    return folder / "data" / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal


def said(folder: Path, words: str) -> int:
    return (folder / "server.log").read_text().count(words)


def manifest(server: RunningServer, name: str, reference: str = "latest") -> tuple[Digest, dict[str, Any]]:
    response = server.get(f"/v2/{name}/manifests/{reference}")
    assert response.status_code == 200, response.text
    return Digest.of(response.content), msgspec.json.decode(response.content, type=dict[str, Any])


def blobs_of(document: dict[str, Any]) -> list[str]:
    return [each["digest"] for each in (document["config"], *document["layers"])]


@pytest.mark.slow
def test_pulls_and_collection_run_against_each_other_and_nothing_is_lost(tmp_path: Path) -> None:
    digests: dict[str, Digest] = {}
    pulls: Counter[str] = Counter()
    deadline = time.monotonic() + SECONDS

    def client(number: int) -> None:
        choose = random.Random(number)  # noqa: S311
        while time.monotonic() < deadline:
            name = choose.choice(NAMES)
            by_digest = name in digests and choose.random() < 0.5
            reference = str(digests[name]) if by_digest else "latest"
            folder = tmp_path / f"client-{number}"
            image = pull(server.url, name, reference, folder, LIMIT)  # checks every digest and size
            assert digests.setdefault(name, image.digest) == image.digest
            pulls["by digest" if by_digest else "by tag"] += 1
            shutil.rmtree(folder)

    settings = {"disk_limit": DISK_LIMIT, "collect_interval": 0.1, "gc_grace": 1.0, "scrub_rate": 0}
    with running(tmp_path, **settings) as server, ThreadPoolExecutor(CLIENTS) as threads:
        for outcome in [threads.submit(client, number) for number in range(CLIENTS)]:
            outcome.result()
    log = (tmp_path / "server.log").read_text()
    collected = [int(images) for images in re.findall(r"garbage collected .*?images=(\d+)", log)]
    print(  # noqa: T201
        f"\n{pulls.total()} pulls by {CLIENTS} clients in {SECONDS:g} s, all whole; "
        f"{pulls['by digest']} of them by digest; {len(collected)} collections took {sum(collected)} images; "
        f"{log.count('build finished')} builds, {log.count('blob made again')} blobs asked for and made again"
    )
    assert sum(collected) > 10
    assert log.count("blob made again") > 0
    assert " 500 " not in log
    assert "Traceback" not in log


@pytest.mark.parametrize("damage", [lose, cut])
def test_blobs_that_go_under_a_running_server_come_back_with_the_same_digest(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with running(tmp_path) as server:
        digest, document = manifest(server, "greeter")
        for each in blobs_of(document):
            damage(blob_file(tmp_path, each))
            response = server.get(f"/v2/greeter/blobs/{each}")
            assert response.status_code == 200
            assert str(Digest.of(response.content)) == each
        damage(blob_file(tmp_path, digest))
        assert manifest(server, "greeter", str(digest)) == (digest, document)
        shutil.rmtree(tmp_path / "data" / "blobs" / "sha256")
        for number in range(256):
            (tmp_path / "data" / "blobs" / "sha256" / f"{number:02x}").mkdir(parents=True)
        assert pull(server.url, "greeter", str(digest), tmp_path / "client", LIMIT).digest == digest


def test_a_blob_that_rots_is_found_in_the_background_and_made_again(tmp_path: Path) -> None:
    with running(tmp_path, scrub_interval=0.2, scrub_rate=1 << 30) as server:
        digest, document = manifest(server, "greeter")
        for each in (str(digest), *blobs_of(document)):
            file = blob_file(tmp_path, each)
            flip(file)
            wait_until(lambda: _holds(file, each))  # noqa: B023


def _holds(file: Path, digest: str) -> bool:
    """Return whether a file, which may go at any time, is there with its digest."""
    with suppress(FileNotFoundError):
        return str(Digest.of(file.read_bytes())) == digest
    return False


def test_after_a_crash_a_damaged_blob_is_not_served(tmp_path: Path) -> None:
    with running(tmp_path, scrub_rate=0) as server:
        digest, document = manifest(server, "greeter")
        server.kill()
    for each in (str(digest), *blobs_of(document)):
        flip(blob_file(tmp_path, each))
    with running(tmp_path, scrub_rate=0) as server:
        assert pull(server.url, "greeter", str(digest), tmp_path / "client", LIMIT).digest == digest
        server.process.terminate()
        assert server.process.wait(LIMIT) == 0
    with running(tmp_path, scrub_rate=0):
        assert said(tmp_path, "the last server was killed") == 1


@pytest.mark.slow
def test_kills_while_pulling_and_collecting_leave_nothing_to_repair_by_hand(tmp_path: Path) -> None:
    digests: dict[str, Digest] = {}
    settings = {"disk_limit": DISK_LIMIT, "collect_interval": 0.05, "gc_grace": 0.5}
    kills, pulls = 5, 0
    for kill in range(kills):
        choose = random.Random(kill)  # noqa: S311
        with running(tmp_path, **settings) as server, ThreadPoolExecutor(3) as threads:
            clients = [
                threads.submit(_pull_until_it_breaks, server, tmp_path / f"client-{kill}-{number}", digests)
                for number in range(3)
            ]
            time.sleep(choose.uniform(1.0, 2.5))
            server.kill()
            pulls += sum(client.result() for client in clients)
    with running(tmp_path) as server:
        for name, digest in digests.items():
            assert (
                pull(server.url, name, str(digest), tmp_path / f"again-{digest.hex}", LIMIT).digest == digest
            )
    print(f"\n{pulls} pulls, {kills} kills, then all {len(digests)} images by digest, whole")  # noqa: T201
    assert digests


def _pull_until_it_breaks(server: RunningServer, folder: Path, digests: dict[str, Digest]) -> int:
    choose = random.Random(folder.name)  # noqa: S311
    for number in itertools.count():
        name = choose.choice(NAMES)
        try:
            image = pull(server.url, name, "latest", folder / str(number), LIMIT)
        except PullError:
            return number
        assert digests.setdefault(name, image.digest) == image.digest
    raise AssertionError
