"""Serving while a large image is packed: how long manifests take, and the memory of all that the server is.

Everything is realised before, and no layer is known. One client asks for the manifest of a small image over
one connection, at a steady rate: first while nothing else happens, then until the large image is there.
Another image with the same packages and one more follows, to tell what sharing layers saves.
"""

import asyncio
import http.client
import json
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.table import Table

from benchmarks.packing import realised
from benchmarks.servers import LIMIT, RunningServer, running
from chandlery.oci.documents import OCI_MANIFEST, Platform
from chandlery.server.parts import open_parts
from chandlery.settings.settings import Settings

_SMALL = "git"
# 2 GB together.
_LARGE = ("libreoffice", "texlive-latex-extra", "gimp", "openjdk-17-jdk-headless", "golang-go")
# What the second large image has besides.
_MORE = "nodejs"

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
    serving = running(
        "Chandlery",
        (sys.executable, "-m", "chandlery", "serve"),
        lambda port: ("--port", str(port), "--data-dir", str(data_dir)),
        data_dir,
        # Fetching a package index takes memory, too, and isn't what is measured.
        {
            "CHANDLERY_SOURCE_REFRESH": "86400",
            "CHANDLERY_PLATFORMS": json.dumps([Platform.of_host().architecture]),
        },
    )
    with serving as running_server:
        server = _Measured(running_server)
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
    """Return it in milliseconds."""
    return statistics.quantiles(times, n=100)[percent - 1] * 1e3


@dataclass
class _Measured:
    """A running server; `pss` and `rss` are the most bytes that were seen, `pulls` the seconds by name."""

    server: RunningServer
    pss: int = 0
    rss: int = 0
    pulls: dict[str, float] = field(default_factory=dict)

    def pull(self, name: str) -> None:
        """Ask for a manifest until it is there."""
        began = time.perf_counter()
        url = f"{self.server.url}/v2/{name}/manifests/latest"
        with httpx.Client(timeout=LIMIT, follow_redirects=True) as client:
            client.get(url, headers={"accept": OCI_MANIFEST}).raise_for_status()
        self.pulls[name] = time.perf_counter() - began

    def ask(self, goes_on: Callable[[int], bool]) -> list[float]:
        """Ask for the small image's manifest as long as that is wanted; give the seconds of each answer."""
        times: list[float] = []
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=LIMIT)
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
        """Look at the memory of all its processes while an image is pulled."""
        while pull.is_alive():
            pss, rss = self.server.memory()
            self.pss, self.rss = max(self.pss, pss), max(self.rss, rss)
            time.sleep(_SAMPLING)
