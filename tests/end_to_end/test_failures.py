"""What a running server does when a limit is reached, Nix dies under it, or its disk turns read-only."""

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from chandlery.demo.registry_client import pull
from tests.support.package_sets import SOURCE, Gates
from tests.support.running import require
from tests.support.servers import LIMIT, RunningServer, serving, wait_until


def refusal(server: RunningServer, name: str) -> tuple[int, str]:
    """Return the status and the message with which an image is refused."""
    response = server.get(f"/v2/{name}/manifests/latest")
    (error,) = response.json()["errors"]
    return response.status_code, error["message"]


def test_an_image_that_is_too_large_is_refused_with_the_limit(tmp_path: Path) -> None:
    limits = {"CHANDLERY_MAX_PACKAGES": "2", "CHANDLERY_MAX_CLOSURE_SIZE": "1000000"}
    with serving(tmp_path / "data", SOURCE, tmp_path / "log", variables=limits) as server:
        status, message = refusal(server, "hello/jq/greeter")
        assert (status, "3 packages, and 2 are allowed" in message) == (422, True)
        assert "max_packages" in message
        status, message = refusal(server, "large")
        assert (status, "an image may take 1.0 MB on this server" in message) == (422, True)
        assert "max_closure_size" in message
        pull(server.url, "hello/jq", "latest", tmp_path / "pulled", LIMIT)


def test_a_disk_that_is_nearly_full_takes_nothing_new_and_serves_what_is_there(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with serving(data_dir, SOURCE, tmp_path / "first.log") as server:
        pull(server.url, "hello", "latest", tmp_path / "pulled", LIMIT)
    with serving(
        data_dir, SOURCE, tmp_path / "second.log", variables={"CHANDLERY_MIN_FREE_DISK": str(1 << 60)}
    ) as server:
        status, message = refusal(server, "jq")
        assert (status, "too little is left on the device" in message) == (424, True)
        assert "min_free_disk" in message
        pull(server.url, "hello", "latest", tmp_path / "again", LIMIT)


def test_a_nix_that_is_killed_fails_that_pull_and_not_the_next(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    gates = Gates(tmp_path / "gates", data_dir)
    variables = {"CHANDLERY_FAILURE_MEMORY": "0"}
    with (
        serving(data_dir, SOURCE, tmp_path / "log", variables=variables) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(refusal, server, "waiting-a")
        wait_until((tmp_path / "gates" / "waiting-a.reached").exists)
        for number in server.processes():
            if b"--realise" in Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0"):
                os.kill(number, signal.SIGKILL)
        status, message = waiting.result(LIMIT)
        assert 400 <= status < 500
        assert "could not be built" in message
        gates.open("waiting-a")
        pull(server.url, "waiting-a", "latest", tmp_path / "pulled", LIMIT)


@contextmanager
def file_system(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        while os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_turns_read_only_takes_nothing_new_and_serves_what_is_there(tmp_path: Path) -> None:
    require("mount")
    data_dir = tmp_path / "data"
    with (
        file_system(data_dir),
        serving(data_dir, SOURCE, tmp_path / "log", variables={"CHANDLERY_MIN_FREE_DISK": "0"}) as server,
    ):
        pull(server.url, "hello", "latest", tmp_path / "pulled", LIMIT)
        subprocess.run(["mount", "-o", "remount,ro", str(data_dir)], check=False)
        mounted = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        if not any(line[1] == str(data_dir) and line[3].startswith("ro") for line in mounted):
            # Files are open for writing: a read-only bind mount over it does the same to new ones.
            subprocess.run(["mount", "--bind", str(data_dir), str(data_dir)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(data_dir)], check=True)
        status, message = refusal(server, "jq")
        assert 400 <= status < 500
        assert "ead-only" in message
        pull(server.url, "hello", "latest", tmp_path / "again", LIMIT)
        assert httpx.get(f"{server.url}/healthz").is_success
        assert httpx.get(f"{server.url}/readyz").status_code == 503
