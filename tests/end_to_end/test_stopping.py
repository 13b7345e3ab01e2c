"""A server that is stopped finishes what it sends, and the next one what it was building."""

import os
import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.support.package_sets import SOURCE, Gates
from tests.support.servers import LIMIT, RunningServer, serving, wait_until


def begin_download(server: RunningServer, size: int) -> socket.socket:
    """Ask for the layer of the given size, and read nothing of it yet."""
    manifest = server.get("/v2/large/manifests/latest").json()
    (digest,) = [layer["digest"] for layer in manifest["layers"] if layer["size"] >= size]
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=LIMIT)
    request = f"GET /v2/large/blobs/{digest} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    connection.sendall(request.encode())
    return connection


def test_sigterm_lets_what_is_being_sent_end(tmp_path: Path) -> None:
    size = 8 << 20
    variables = {"CHANDLERY_COMPRESSION": "none"}
    with serving(tmp_path / "data", SOURCE, tmp_path / "log", variables=variables) as server:
        with begin_download(server, size) as connection:
            received = len(connection.recv(1000))
            os.kill(server.process.pid, signal.SIGTERM)
            wait_until(lambda: not server.answers())
            while piece := connection.recv(1 << 16):
                received += len(piece)
        assert received > size
        assert server.process.wait(LIMIT) == 0
        assert not server.processes()


def test_who_reads_nothing_keeps_no_server_from_stopping(tmp_path: Path) -> None:
    variables = {"CHANDLERY_COMPRESSION": "none", "CHANDLERY_STOP_TIMEOUT": "2"}
    with serving(tmp_path / "data", SOURCE, tmp_path / "log", variables=variables) as server:
        with begin_download(server, 8 << 20):
            os.kill(server.process.pid, signal.SIGTERM)
            server.process.wait(LIMIT)
        wait_until(lambda: not server.processes())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_next_server_takes_over_what_was_being_built(tmp_path: Path, how: signal.Signals) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    gates = Gates(tmp_path / "gates", data_dir)
    reached = tmp_path / "gates" / "waiting-a.reached"
    with serving(data_dir, SOURCE, tmp_path / "first.log", variables={"CHANDLERY_HOLD": "0.1"}) as server:
        assert httpx.get(f"{server.url}/v2/waiting-a/manifests/latest").status_code == 307
        wait_until(reached.exists)
        if how == signal.SIGKILL:
            server.kill()
        else:
            os.kill(server.process.pid, how)
            server.process.wait(LIMIT)
    reached.unlink()
    with serving(data_dir, SOURCE, tmp_path / "second.log") as server:
        wait_until(reached.exists)
        gates.open("waiting-a")
        wait_until(lambda: "build finished" in server.log.read_text())
        assert server.get("/v2/waiting-a/manifests/latest").is_success
        assert server.log.read_text().count("build queued") == 1
        assert not list(data_dir.glob("builds/*.unfinished"))
