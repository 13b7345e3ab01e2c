"""A build that takes longer than any proxy or client holds a connection, behind a proxy that cuts at 30 s."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.clients import ClientError, Containerd, Docker, Podman, Skopeo
from tests.support.package_sets import SOURCE, Gates
from tests.support.proxy import proxy
from tests.support.running import require
from tests.support.servers import RunningServer, serving, wait_until

# Seconds. The build ends after this; the proxy gives up on a silent server after the other.
_BUILD_TIME = 65.0


@contextmanager
def chandlery(folder: Path, **variables: str) -> Iterator[tuple[RunningServer, Gates]]:
    """Start a server of the small package set; give the gates of its builders too."""
    data_dir = folder / "data"
    data_dir.mkdir()
    gates = Gates(folder / "gates", data_dir)
    with serving(data_dir, SOURCE, folder / "server.log", variables=variables) as server:
        yield server, gates


def test_all_clients_wait_for_a_build_of_more_than_a_minute_behind_a_proxy(
    tmp_path: Path,
    docker: Docker,
    containerd: Containerd,
    podman: Podman,
    skopeo: Skopeo,
) -> None:
    require("nginx")
    with chandlery(tmp_path) as (server, gates), proxy(tmp_path, server) as port:
        image = f"127.0.0.1:{port}/waiting-a/hello:latest"
        pulls: list[Callable[[], object]] = [
            lambda: docker.pull(image),
            lambda: containerd.pull(image),
            lambda: podman.pull(image),
            lambda: skopeo.copy(image, f"dir:{tmp_path / 'copied'}"),
        ]
        opened = threading.Event()

        def open_gate() -> None:
            opened.set()
            gates.open("waiting-a")

        def wait_for_all(pull: Callable[[], object]) -> None:
            pull()
            assert opened.is_set(), "there was no image yet"

        opener = threading.Timer(_BUILD_TIME, open_gate)
        opener.start()
        try:
            with ThreadPoolExecutor(len(pulls)) as pool:
                for each in [pool.submit(wait_for_all, pull) for pull in pulls]:
                    each.result()
        finally:
            opener.cancel()
        log = (tmp_path / "server.log").read_text()
        assert log.count("build queued") == 1
        requests = (tmp_path / "access.log").read_text()
        assert " 307 " in requests
        assert " 504 " not in requests


def test_who_waits_too_long_is_told_to_come_again_and_what_the_build_is(
    tmp_path: Path, docker: Docker
) -> None:
    waits = {"CHANDLERY_HOLD": "0.2", "CHANDLERY_REDIRECTIONS": "2"}
    with chandlery(tmp_path, **waits) as (server, gates):
        image = f"{server.url.removeprefix('http://')}/waiting-a"
        url = f"{server.url}/v2/waiting-a/manifests/latest"
        response = httpx.get(url, follow_redirects=True)
        assert response.status_code == 429
        assert len(response.history) == 2
        assert int(response.headers["retry-after"]) > 0
        (error,) = response.json()["errors"]
        assert error["detail"]["build"] in error["message"]
        with pytest.raises(ClientError, match="is being built"):
            docker.pull(image)
        gates.open("waiting-a")
        wait_until(lambda: httpx.get(url, follow_redirects=True).is_success)
        docker.pull(image)
