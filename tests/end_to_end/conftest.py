"""The server and the clients, one of each for all tests."""

import os
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.clients import Containerd, Daemon, Docker, Engine, Podman, Skopeo
from tests.support.running import Server, TlsServer, require
from tests.support.servers import free_port

# Seconds; the first start of all reads a package index.
_SERVER_START_LIMIT = 180


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    require("dockerd", "docker", "containerd", "runc")
    with Docker.start() as client:
        yield client


@pytest.fixture(scope="session")
def containerd() -> Iterator[Containerd]:
    require("containerd", "ctr", "runc")
    with Containerd.start() as client:
        yield client


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    require("podman", "runc")
    with Podman.start() as client:
        yield client


@pytest.fixture(scope="session")
def skopeo() -> Iterator[Skopeo]:
    require("skopeo", root=False)
    with Skopeo.start() as client:
        yield client


@pytest.fixture(scope="session", params=["docker", "containerd"])
def engine(request: pytest.FixtureRequest) -> Engine:
    client: Engine = request.getfixturevalue(request.param)
    return client


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    require("nix", root=False)
    with _data_folder() as data_dir, tempfile.TemporaryDirectory(prefix="chandlery-") as log_folder:
        port = free_port()
        running = Server(f"127.0.0.1:{port}", data_dir, Path(log_folder) / "server.log")
        argv = [
            *(sys.executable, "-m", "chandlery", "serve", "--host", "127.0.0.1"),
            *("--port", str(port), "--data-dir", str(data_dir)),
        ]
        with Daemon.start(argv, os.environ, running.log) as daemon:
            daemon.wait_until(running.answers, _SERVER_START_LIMIT)
            yield running


@contextmanager
def _data_folder() -> Iterator[Path]:
    """Return the folder in CHANDLERY_TEST_DATA, so that what is built is there next time; else a new one."""
    kept = os.environ.get("CHANDLERY_TEST_DATA")
    if kept:
        yield Path(kept).absolute()
    else:
        with tempfile.TemporaryDirectory(prefix="chandlery-") as folder:
            yield Path(folder)


class _Trusted(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"trusted")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name in the base class)
        pass


class _Listener(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that refuse the certificate are what the tests are about."""


@pytest.fixture(scope="session")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    require("openssl", root=False)
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with _Listener(("127.0.0.1", 0), _Trusted) as listener:
        # The handshake is the handler's thread's work: a client that refuses must not disturb the listener.
        listener.socket = context.wrap_socket(
            listener.socket, server_side=True, do_handshake_on_connect=False
        )
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield TlsServer(f"https://127.0.0.1:{listener.server_port}/", certificate.read_text())
        listener.shutdown()
        thread.join()
