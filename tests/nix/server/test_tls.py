import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from chandlery.errors import SettingsError
from chandlery.oci.digest import Digest
from chandlery.server.tls import CertificateCopy, CertificateWatch
from tests.support.certificates import Certificate, make_certificate
from tests.support.package_sets import SOURCE, Gates
from tests.support.servers import LIMIT, RunningServer, serving, wait_until

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="not installed: openssl")

P384 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1")
P521 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp521r1")
ED448 = ("-newkey", "ed448")


def copy_of(source: Certificate, folder: Path) -> CertificateCopy:
    return CertificateCopy(source.certificate, source.key, folder / "tls.pem")


@pytest.mark.parametrize(
    "key", [P384, ("-newkey", "rsa:2048"), ("-newkey", "ed25519")], ids=["P-384", "RSA", "Ed25519"]
)
def test_a_certificate_that_works_is_copied_once(tmp_path: Path, key: tuple[str, ...]) -> None:
    source = make_certificate(tmp_path, "one", key)
    copy = copy_of(source, tmp_path)
    assert copy.update()
    assert not copy.update()
    assert copy.file.read_text() == source.certificate.read_text() + "\n" + source.key.read_text()
    assert stat.S_IMODE(copy.file.stat().st_mode) == 0o600


def remove(source: Certificate, folder: Path) -> None:
    source.certificate.unlink()


def cut(source: Certificate, folder: Path) -> None:
    source.certificate.write_bytes(source.certificate.read_bytes()[:100])


def exchange_the_key(source: Certificate, folder: Path) -> None:
    source.key.write_bytes(make_certificate(folder, "other").key.read_bytes())


def use_a_key_that_openssl_takes_and_the_server_does_not(source: Certificate, folder: Path) -> None:
    source.replace(make_certificate(folder, "other", P521))


def use_another_key_of_that_kind(source: Certificate, folder: Path) -> None:
    source.replace(make_certificate(folder, "other", ED448))


def encrypt_the_key(source: Certificate, folder: Path) -> None:
    encrypted = make_certificate(folder, "other", ("-newkey", "rsa:2048"))
    subprocess.run(
        [
            *("openssl", "rsa", "-aes256", "-passout", "pass:secret"),
            *("-in", str(encrypted.key), "-out", str(source.key)),
        ],
        check=True,
        capture_output=True,
    )
    source.certificate.write_bytes(encrypted.certificate.read_bytes())


CHANGES = [
    remove,
    cut,
    exchange_the_key,
    use_a_key_that_openssl_takes_and_the_server_does_not,
    use_another_key_of_that_kind,
    encrypt_the_key,
]


@pytest.mark.parametrize("spoil", CHANGES, ids=lambda change: change.__name__)
def test_what_does_not_work_is_told_and_not_copied(
    tmp_path: Path, spoil: Callable[[Certificate, Path], None]
) -> None:
    source = make_certificate(tmp_path, "one")
    copy = copy_of(source, tmp_path)
    copy.update()
    before = copy.file.read_bytes()
    spoil(source, tmp_path)
    with pytest.raises(SettingsError, match=r"one\.pem"):
        copy.update()
    assert copy.file.read_bytes() == before
    source.replace(make_certificate(tmp_path, "two"))
    assert copy.update()
    assert sorted(tmp_path.glob("tls.pem*")) == [copy.file]


def test_what_does_not_work_is_tried_once(tmp_path: Path) -> None:
    source = make_certificate(tmp_path, "one", P521)
    copy = copy_of(source, tmp_path)
    with pytest.raises(SettingsError):
        copy.update()
    assert not copy.update()
    assert not copy.file.exists()


def test_a_worker_knows_that_what_it_shows_is_outdated_whoever_has_replaced_it(tmp_path: Path) -> None:
    source = make_certificate(tmp_path, "one")
    copy = copy_of(source, tmp_path)
    assert copy.update()
    before = CertificateWatch(copy_of(source, tmp_path), 60.0)
    assert not before.has_successor
    source.replace(make_certificate(tmp_path, "two"))
    assert copy.update()
    assert before.has_successor
    assert not CertificateWatch(copy, 60.0).has_successor


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
    """Tell whether the server's certificate is this one."""
    try:
        return httpx.get(f"{server.url}/v2/", verify=trusting(source)).is_success
    except httpx.ConnectError:
        return False


def manifest_of(server: RunningServer, name: str) -> Any:
    """Pull as docker does: redirections are followed, so that a build is waited for at a new worker too."""
    url = f"{server.url}/v2/{name}/manifests/latest"
    return httpx.get(url, verify=False, follow_redirects=True, timeout=LIMIT).json()  # noqa: S501


@pytest.mark.nix
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


@pytest.mark.nix
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


@pytest.mark.nix
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


@pytest.mark.nix
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
