import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from chandlery.oci.digest import Digest
from tests.support.certificates import Certificate, make_certificate
from tests.support.package_sets import SOURCE, Gates
from tests.support.servers import LIMIT, RunningServer, serving, wait_until

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="not installed: openssl")
P521 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp521r1")


# A server


@contextmanager
def tls_server(folder: Path, source: Certificate) -> Iterator[RunningServer]:
    variables = {
        "CHANDLERY_TLS_CERTIFICATE": str(source.certificate),
        "CHANDLERY_TLS_KEY": str(source.key),
        "CHANDLERY_TLS_REFRESH": "0.2",
        "CHANDLERY_HOLD": "5",
        "CHANDLERY_COMPRESSION": "none",
    }
    with serving(folder / "data", SOURCE, folder / "server.log", variables=variables) as server:
        yield server


def trusting(source: Certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=source.certificate)


def shows(server: RunningServer, source: Certificate) -> bool:
    """Return whether the server's certificate is this one."""
    try:
        return httpx.get(f"{server.url}/v2/", verify=trusting(source)).is_success
    except httpx.ConnectError:
        return False


def manifest_of(server: RunningServer, name: str) -> Any:
    """Pull as docker does: redirections are followed, so that a build is waited for at a new worker too."""
    url = f"{server.url}/v2/{name}/manifests/latest"
    return httpx.get(url, verify=False, follow_redirects=True, timeout=LIMIT).json()  # noqa: S501


def test_a_server_shows_a_new_certificate_and_nobody_is_cut_off(tmp_path: Path) -> None:
    gates = Gates(tmp_path / "gates", tmp_path / "data")
    one, two = make_certificate(tmp_path, "one"), make_certificate(tmp_path, "two")
    shown = make_certificate(tmp_path, "shown")
    shown.replace(one)
    with tls_server(tmp_path, shown) as server, ThreadPoolExecutor() as threads:
        manifest = manifest_of(server, "large")
        largest = max(manifest["layers"], key=lambda layer: int(layer["size"]))
        blob = f"{server.url}/v2/large/blobs/{largest['digest']}"
        waiting = threads.submit(manifest_of, server, "waiting-a")
        wait_until(lambda: gates.is_reached("waiting-a"))
        with httpx.Client(verify=trusting(one)) as client, client.stream("GET", blob) as download:
            parts = download.iter_raw(1 << 10)
            begun = next(parts)
            shown.replace(two)
            wait_until(lambda: shows(server, two))
            whole = begun + b"".join(parts)
        assert len(whole) == largest["size"] > 8 << 20
        gates.open("waiting-a")
        assert waiting.result()["layers"]
        # The old worker goes when all of it is done.
        wait_until(lambda: not shows(server, one) and shows(server, two))


def test_a_bad_certificate_changes_nothing_but_the_log(tmp_path: Path) -> None:
    shown = make_certificate(tmp_path, "shown")
    with tls_server(tmp_path, shown) as server:
        before = make_certificate(tmp_path, "before")
        before.replace(shown)
        shown.replace(make_certificate(tmp_path, "bad", P521))
        wait_until(lambda: "the certificate stays as it was" in server.log.read_text())
        assert shows(server, before)
        # A worker that has to be started anew has the good one as well.
        for process in set(server.processes()) - {server.process.pid}:
            os.kill(process, signal.SIGKILL)
        wait_until(lambda: shows(server, before))
        assert server.log.read_text().count("the certificate stays as it was") <= 2
        assert server.process.poll() is None


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_a_server_speaks_http_2_and_nothing_older_than_tls_1_2(tmp_path: Path) -> None:
    shown = make_certificate(tmp_path, "shown")
    with tls_server(tmp_path, shown) as server:
        host, port = "127.0.0.1", int(server.url.rpartition(":")[2])

        def protocols(context: ssl.SSLContext) -> tuple[str | None, str | None]:
            with context.wrap_socket(socket.create_connection((host, port))) as connection:
                return connection.version(), connection.selected_alpn_protocol()

        context = trusting(shown)
        context.check_hostname = False
        context.set_alpn_protocols(["h2", "http/1.1"])
        assert protocols(context) == ("TLSv1.3", "h2")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        assert protocols(context) == ("TLSv1.2", "http/1.1")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            protocols(context)


def test_images_are_pulled_over_http_2(tmp_path: Path) -> None:
    shown = make_certificate(tmp_path, "shown")
    with tls_server(tmp_path, shown) as server:
        manifest = manifest_of(server, "large")
        largest = max(manifest["layers"], key=lambda layer: int(layer["size"]))
        urls = [
            f"{server.url}/v2/large/manifests/latest",
            f"{server.url}/v2/large/manifests/latest",
            f"{server.url}/v2/large/blobs/{largest['digest']}",
        ]
        command = [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--http2",
            "--cacert",
            str(shown.certificate),
        ]
        told = ["--write-out", "%{http_version} %{num_connects} %{response_code}\n"]
        files = [tmp_path / f"{number}" for number in range(len(urls))]
        outputs = [text for file in files for text in ("--output", str(file))]
        lines = subprocess.run(
            [*command, *told, *outputs, *urls], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        # One connection for all.
        assert lines == ["2 1 200", "2 0 200", "2 0 200"]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert json.loads(files[0].read_bytes()) == manifest
        assert str(Digest.of(files[2].read_bytes())) == largest["digest"]
        part = subprocess.run(
            [*command, "--range", "1000-4000000", urls[2]], check=True, capture_output=True
        ).stdout
        assert part == files[2].read_bytes()[1000:4000001]
