"""Serving images that are there: Chandlery, Debian's docker-registry and nginx with the same blobs.

Each server is a process of its own on this machine, with its default settings (Chandlery: one worker) and its
log in a file. wrk asks for manifests as docker does. Blobs are read by a client that has the kernel drop the
bytes, so that it isn't what is measured.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.servers import LIMIT, RunningServer, running
from chandlery.nix.configuration import host_paths
from chandlery.oci.digest import Digest
from chandlery.oci.documents import DOCKER_MANIFEST, DOCKER_MANIFEST_LIST, OCI_INDEX, OCI_MANIFEST

_SOURCE = Path(__file__).parent / "serving_set"

_ACCEPT = ", ".join((DOCKER_MANIFEST, DOCKER_MANIFEST_LIST, OCI_INDEX, OCI_MANIFEST, "*/*"))
_CONNECTIONS = 32
_SECONDS = 2

_BLOB_CONNECTIONS = 4
_BLOCK = 1 << 20

_DOCKER_REGISTRY = """version: 0.1
storage: {{cache: {{blobdescriptor: inmemory}}, filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""

_NGINX = """
daemon off; worker_processes auto; pid {folder}/nginx.pid; error_log stderr; user {user};
events {{ worker_connections 768; }}
http {{
    sendfile on; tcp_nopush on; access_log {folder}/access.log;
    server {{ listen 127.0.0.1:{port}; root {root}; default_type application/octet-stream; }}
}}
"""


class _Blob(msgspec.Struct, frozen=True):
    """What is read of a descriptor; the size in bytes."""

    digest: str
    size: int


class _Manifest(msgspec.Struct):
    """What is read of a manifest."""

    config: _Blob
    layers: tuple[_Blob, ...]


@dataclass(frozen=True)
class _Image:
    """An image that Chandlery has made: its manifest as `latest` gives it, and its blobs."""

    name: str
    manifest: bytes
    layer: _Blob
    blobs: tuple[Digest, ...]

    @property
    def digest(self) -> Digest:
        return Digest.of(self.manifest)

    @property
    def layer_path(self) -> str:
        return f"/v2/{self.name}/blobs/{self.layer.digest}"


def tables(folder: Path) -> list[Table]:
    """Measure manifests, then blobs; everything is made in `folder`, which is needed no more afterwards."""
    with ExitStack() as stack:
        data = folder / "data"
        variables = {"CHANDLERY_SUBSTITUTERS": "[]", "CHANDLERY_HOST_PATHS": ",".join(host_paths())}
        ours = stack.enter_context(
            running(
                "Chandlery",
                (sys.executable, "-m", "chandlery", "serve", "--source", f"path!{_SOURCE}"),
                lambda port: ("--port", str(port), "--data-dir", str(data)),
                folder,
                variables,
            )
        )
        images = [_pulled(ours, name) for name in ("few", "many", "blob-100", "blob-1000")]
        registry = folder / "docker-registry"
        static = folder / "nginx"
        for image in images:
            _put_in_registry(image, data, registry)
            _put_in_folder(image, data, static)
        servers = [
            ours,
            stack.enter_context(_docker_registry(registry, folder)),
            stack.enter_context(_nginx(static, folder)),
        ]
        return [_manifests(servers, images[:2]), _blobs(servers, *images[2:])]


def _manifests(servers: Sequence[RunningServer], images: Sequence[_Image]) -> Table:
    table = Table(
        *(
            "manifest",
            "asked by",
            "server",
            "requests/s",
            "as docker-registry",
            "p50 ms",
            "p99 ms",
            "alone, p50 ms",
        ),
        title=f"manifests, {_CONNECTIONS} connections kept alive",
    )
    for image in images:
        for kind, reference in (("tag", "latest"), ("digest", str(image.digest))):
            measured = {}
            for server in servers:
                url = f"{server.url}/v2/{image.name}/manifests/{reference}"
                response = httpx.get(url, headers={"accept": _ACCEPT})
                assert Digest.of(response.raise_for_status().content) == image.digest, url
                alone = _wrk(url, 1, 1)
                measured[server.name] = (*_wrk(url, _CONNECTIONS, _SECONDS), alone[1])
            for name, (rate, median, slow, alone_median) in measured.items():
                table.add_row(
                    f"{len(image.manifest) / 1000:.1f} kB",
                    kind,
                    name,
                    f"{rate:,.0f}",
                    f"{rate / measured['docker-registry'][0]:.1f} times",
                    *(f"{value:.2f}" for value in (median, slow, alone_median)),
                )
    return table


def _blobs(servers: Sequence[RunningServer], blob: _Image, large: _Image) -> Table:
    table = Table(
        *("blob", "server", "MB/s", "CPU s/GB", "RSS grows by MB"),
        title=f"blobs, {_BLOB_CONNECTIONS} connections; of 1 GB one",
    )
    size, large_size = blob.layer.size, large.layer.size
    for title, path, amount, connections, headers in (
        ("100 MB", blob.layer_path, size, _BLOB_CONNECTIONS, ""),
        ("100 MB but its first byte", blob.layer_path, size - 1, _BLOB_CONNECTIONS, "Range: bytes=1-\r\n"),
        ("1 GB", large.layer_path, large_size, 1, ""),
    ):
        for server in servers:
            rate, cpu, growth = _download(server, path, amount, connections, headers)
            table.add_row(title, server.name, f"{rate / 1e6:,.0f}", f"{cpu:.2f}", f"{growth / 1e6:.1f}")
    return table


def _wrk(url: str, connections: int, seconds: int) -> tuple[float, float, float]:
    """Return requests per second, and what half of the requests and 99% of them took at most, in ms."""
    command = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}s", "--latency"]
    output = subprocess.run(
        [*command, "--header", f"Accept: {_ACCEPT}", url], check=True, capture_output=True, text=True
    ).stdout
    assert "Non-2xx" not in output, output
    assert "Socket errors" not in output, output
    rate = float(re.findall(r"Requests/sec: +([0-9.]+)", output)[0])
    times = dict(re.findall(r"(50|99)% +([0-9.]+[a-z]+)", output))
    return rate, _milliseconds(times["50"]), _milliseconds(times["99"])


def _milliseconds(text: str) -> float:
    number, unit = re.findall(r"([0-9.]+)([a-z]+)", text)[0]
    return float(number) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]


def _download(
    server: RunningServer, path: str, size: int, connections: int, headers: str
) -> tuple[float, float, int]:
    """Return bytes per second, the server's CPU seconds per GB, and by how many bytes it grew at most.

    Every connection asks again as long as there is time, and once at least.
    """
    deadline = time.perf_counter() + _SECONDS
    done: list[int] = []

    def client() -> None:
        with socket.create_connection(("127.0.0.1", server.port), LIMIT) as connection:
            while not done or time.perf_counter() < deadline:
                request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n"
                connection.sendall(request.encode())
                assert _drop_response(connection) == size
                done.append(size)

    before, cpu = server.memory()[1], server.cpu_seconds()
    most, began = before, time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(connections)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, server.memory()[1])
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    cpu = server.cpu_seconds() - cpu
    return sum(done) / seconds, cpu / (sum(done) / 1e9), most - before


def _drop_response(connection: socket.socket) -> int:
    """Read a response and forget it; give the size of its body in bytes."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(_BLOCK)
    head, _, body = head.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"200", b"206"), head
    size = int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
    left = size - len(body)
    block = bytearray(_BLOCK)
    while left:
        # The kernel copies nothing then (tcp(7)).
        received = connection.recv_into(block, min(left, _BLOCK), socket.MSG_TRUNC)
        assert received, "the connection was closed"
        left -= received
    return size


def _pulled(server: RunningServer, name: str) -> _Image:
    """Have an image built."""
    with httpx.Client(base_url=server.url, timeout=LIMIT, follow_redirects=True) as client:
        response = client.get(f"/v2/{name}/manifests/latest", headers={"accept": _ACCEPT})
    document = msgspec.json.decode(response.raise_for_status().content, type=_Manifest)
    blobs = (document.config, *document.layers)
    largest = max(document.layers, key=lambda layer: layer.size)
    return _Image(name, response.content, largest, tuple(Digest.parse(blob.digest) for blob in blobs))


def _blob_file(data: Path, digest: Digest) -> Path:
    return data / "blobs" / "sha256" / digest.hex[:2] / digest.hex


def _put_in_registry(image: _Image, data: Path, root: Path) -> None:
    """Link an image's blobs as docker-registry keeps them (distribution, registry/storage/paths.go)."""
    top = root / "docker" / "registry" / "v2"
    repository = top / "repositories" / image.name
    for digest in (image.digest, *image.blobs):
        _link(_blob_file(data, digest), top / "blobs" / "sha256" / digest.hex[:2] / digest.hex / "data")
        _write(repository / "_layers" / "sha256" / digest.hex / "link", str(digest))
    manifests = repository / "_manifests"
    for name in (
        f"revisions/sha256/{image.digest.hex}/link",
        "tags/latest/current/link",
        f"tags/latest/index/sha256/{image.digest.hex}/link",
    ):
        _write(manifests / name, str(image.digest))


def _put_in_folder(image: _Image, data: Path, root: Path) -> None:
    """Link an image's manifest and largest layer at the paths of their URLs."""
    manifests = root / "v2" / image.name / "manifests"
    for reference in ("latest", str(image.digest)):
        _link(_blob_file(data, image.digest), manifests / reference)
    _link(_blob_file(data, Digest.parse(image.layer.digest)), Path(f"{root}{image.layer_path}"))


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.hardlink_to(file)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@contextmanager
def _docker_registry(root: Path, folder: Path) -> Iterator[RunningServer]:
    configuration = folder / "docker-registry.yml"

    def arguments(port: int) -> Sequence[str]:
        configuration.write_text(_DOCKER_REGISTRY.format(root=root, port=port))
        return "serve", str(configuration)

    with running("docker-registry", (_program("docker-registry"),), arguments, folder) as server:
        yield server


@contextmanager
def _nginx(root: Path, folder: Path) -> Iterator[RunningServer]:
    configuration = folder / "nginx.conf"

    def arguments(port: int) -> Sequence[str]:
        user = Path(folder).owner()
        configuration.write_text(_NGINX.format(folder=folder, root=root, port=port, user=user))
        return "-p", str(folder), "-c", str(configuration)

    with running("nginx", (_program("nginx"),), arguments, folder) as server:
        yield server


def _program(name: str) -> str:
    """Find a program that may stand where an ordinary user's PATH doesn't look."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found, f"{name} is missing: scripts/setup develop installs it"
    return found


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory(prefix="chandlery-serving-") as folder:
        for table in tables(Path(folder)):
            Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
