"""Serving while a large image is packed: how long manifests take, and the memory of all that the server is.

Everything is realised before, and no layer is known. One client asks for the manifest of a small image over
one connection, at a steady rate: first while nothing else happens, then until the large image is there.
Another image with the same packages and one more follows, to tell what sharing layers saves.
"""

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.table import Table

from benchmarks.packing import realised
from chandlery.app import open_parts
from chandlery.oci import OCI_MANIFEST, Platform
from chandlery.settings import Settings

_SMALL = "git"
# 2 GB together.
_LARGE = ("libreoffice", "texlive-latex-extra", "gimp", "openjdk-17-jdk-headless", "golang-go")
# What the second large image has besides.
_MORE = "nodejs"

_LIMIT = 120.0  # seconds for what takes a few
_INTERVAL = 0.002  # seconds between requests
_QUIET_REQUESTS = 2000
_SAMPLING = 0.2  # seconds between looks at the memory


def table(data_dir: Path) -> Table:
    """Measure with a real server; the data folder loses its blobs, and what is known of layers."""
    megabytes, store_paths = asyncio.run(_realise(data_dir))
    for file in data_dir.glob("build-index-*"):
        file.unlink()
    shutil.rmtree(data_dir / "blobs", ignore_errors=True)
    large, second = "/".join(_LARGE), "/".join((*_LARGE, _MORE))
    with _server(data_dir) as server:
        server.pull(_SMALL)
        quiet = server.ask(lambda number: number < _QUIET_REQUESTS)
        pull = threading.Thread(target=server.pull, args=(large,))
        sampling = threading.Thread(target=server.sample, args=(pull,))
        pull.start()
        sampling.start()
        packing = server.ask(lambda _: pull.is_alive())
        sampling.join()
        server.pull(second)
    result = Table("serving while 2 GB are packed", "", "")
    result.add_row("the large image", f"{megabytes:,.0f} MB", f"{store_paths} store paths")
    for title, times in (("quiet", quiet), ("while it is packed", packing)):
        result.add_row(
            f"a manifest, {title}",
            *(f"p{percent} {_percentile(times, percent):.2f} ms" for percent in (50, 99)),
        )
    ratio = _percentile(packing, 99) / _percentile(quiet, 99)
    result.add_row("its p99 while it is packed", f"{ratio:.1f} times", f"{len(packing):,} requests")
    first_seconds, second_seconds = server.pulls[large], server.pulls[second]
    result.add_row(
        "the large image, asked for to its manifest",
        f"{first_seconds:.2f} s",
        f"{megabytes / first_seconds:,.0f} MB/s",
    )
    result.add_row(
        "with one more package", f"{second_seconds:.2f} s", f"{second_seconds / first_seconds:.0%}"
    )
    result.add_row("memory at most", f"PSS {server.pss / 1e6:.0f} MB", f"RSS {server.rss / 1e6:.0f} MB")
    return result


async def _realise(data_dir: Path) -> tuple[float, int]:
    settings = Settings.load(data_dir=data_dir)
    async with open_parts(settings) as parts:
        await realised(parts, settings, _SMALL)
        await realised(parts, settings, _MORE)
        closure, _ = await realised(parts, settings, *_LARGE)
        return closure.nar_size / 1e6, len(closure.nodes)


def _percentile(times: Sequence[float], percent: int) -> float:
    """Give it in milliseconds."""
    return statistics.quantiles(times, n=100)[percent - 1] * 1e3


@dataclass
class _Server:
    """A running server; `pss` and `rss` are the most bytes that were seen, `pulls` the seconds by name."""

    port: int
    process: "subprocess.Popen[bytes]"
    pss: int = 0
    rss: int = 0
    pulls: dict[str, float] = field(default_factory=dict)

    def pull(self, name: str) -> None:
        """Ask for a manifest until it is there."""
        began = time.perf_counter()
        url = f"http://127.0.0.1:{self.port}/v2/{name}/manifests/latest"
        with httpx.Client(timeout=_LIMIT, follow_redirects=True) as client:
            client.get(url, headers={"accept": OCI_MANIFEST}).raise_for_status()
        self.pulls[name] = time.perf_counter() - began

    def ask(self, goes_on: Callable[[int], bool]) -> list[float]:
        """Ask for the small image's manifest as long as that is wanted; give the seconds of each answer."""
        times: list[float] = []
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_LIMIT)
        while goes_on(len(times)):
            began = time.perf_counter()
            connection.request("GET", f"/v2/{_SMALL}/manifests/latest", headers={"Accept": OCI_MANIFEST})
            response = connection.getresponse()
            assert response.status == 200
            response.read()
            times.append(time.perf_counter() - began)
            time.sleep(_INTERVAL)
        connection.close()
        return times

    def sample(self, pull: threading.Thread) -> None:
        """Look at the memory of all processes but Nix's while an image is pulled (proc(5), smaps_rollup)."""
        while pull.is_alive():
            pss = rss = 0
            for process in _tree(self.process.pid):
                with suppress(OSError):
                    if (process / "comm").read_text().startswith("nix"):
                        continue
                    lines = (process / "smaps_rollup").read_text().splitlines()[1:]
                    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
                    pss += kilobytes["Pss"] << 10
                    rss += kilobytes["Rss"] << 10
            self.pss, self.rss = max(self.pss, pss), max(self.rss, rss)
            time.sleep(_SAMPLING)


def _architecture() -> str:
    """Give the host's, as the setting takes it."""
    return json.dumps([Platform.of_host().architecture])


def _tree(process: int) -> Iterator[Path]:
    """Give a process and all that come of it."""
    yield Path(f"/proc/{process}")
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text().split():
                yield from _tree(int(child))


@contextmanager
def _server(data_dir: Path) -> Iterator[_Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    with (data_dir / "bench-serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "chandlery", "serve", "--port", str(port), "--data-dir", str(data_dir)],
            # Fetching a package index takes memory, too, and isn't what is measured.
            env={**os.environ, "CHANDLERY_SOURCE_REFRESH": "86400", "CHANDLERY_PLATFORMS": _architecture()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _LIMIT
        while not _answers(port):
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, "the server doesn't answer"
            time.sleep(0.05)
        yield _Server(port, process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _answers(port: int) -> bool:
    with suppress(httpx.TransportError):
        return bool(httpx.get(f"http://127.0.0.1:{port}/v2/").status_code)
    return False
