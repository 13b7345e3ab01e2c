"""What a client downloads that pulls one image after another, keeping its layers.

The client is containerd, which knows layers by their digest, as podman does. Docker's own image store (its
default before version 29) takes a layer for known only if all layers under it are the same.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families

from chandlery.layers.archive import pack_store_paths
from chandlery.nix.closure import StorePath
from tests.support.clients import Containerd, Skopeo
from tests.support.running import Server
from tests.support.servers import plain_environment

# They use the server of conftest.py, as do other tests of this group.
pytestmark = pytest.mark.xdist_group("daemons")


IMAGES = (
    "shell/git/jq/curl",
    "python3",
    "python3/git",
    "nodejs",
    "postgresql-client/jq",
    "ffmpeg",
    "shell/nodejs/git",
    "shell/ffmpeg/curl",
    "curl/jq/postgresql-client/python3",
    "shell",
)


@pytest.fixture
def new_containerd() -> Iterator[Containerd]:
    """Return a containerd that holds no layer."""
    with Containerd.start() as client:
        yield client


def sent_blobs(server: Server) -> int:
    """Return how many bytes of blobs the server has sent so far."""
    text = httpx.get(f"{server.url}/metrics").text
    return sum(
        int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "chandlery_response_bytes_total" and sample.labels["route"] == "blob"
    )


def store_paths(image: str, data_dir: Path) -> set[str]:
    """Return the store paths that layers of an image are planned of."""
    printed = subprocess.run(
        [sys.executable, "-m", "chandlery", "plan", *image.split("/"), "--json", "--data-dir", str(data_dir)],
        env=plain_environment(),
        check=True,
        capture_output=True,
        timeout=300,
    ).stdout
    return {path for layer in json.loads(printed)["layers"] for path in layer["storePaths"]}


def test_ten_images_cost_hardly_more_than_with_a_layer_for_each_package(
    new_containerd: Containerd,
    skopeo: Skopeo,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = roots = 0
    # Made before, so that nothing but layers is on the way.
    for name in IMAGES:
        manifest = json.loads(skopeo.manifest(server.image(f"amd64/{name}")))
        whole += sum(layer["size"] for layer in manifest["layers"])
        roots += manifest["layers"][-1]["size"] + manifest["config"]["size"]

    before = sent_blobs(server)
    for name in IMAGES:
        new_containerd.fetch(server.image(f"amd64/{name}"))
    downloaded = sent_blobs(server) - before

    def size(path: str) -> int:
        store = server.data_dir / "nix" / "nix" / "store"
        file = tmp_path / Path(path).name
        packed = pack_store_paths(store, (StorePath.parse(path),), "gzip", file)
        file.unlink()
        return packed.descriptor.size

    paths = set().union(*(store_paths(name, server.data_dir) for name in IMAGES))
    with ThreadPoolExecutor(2) as threads:
        alone = sum(threads.map(size, sorted(paths))) + roots
    told = (
        f"{len(IMAGES)} images of {whole / 1e6:.1f} MB in all, {len(paths)} store paths: "
        f"{downloaded / 1e6:.1f} MB were downloaded; with a layer for each store path {alone / 1e6:.1f} MB"
    )
    with capsys.disabled():
        typer.echo(f"\n{told}")
    assert downloaded < 1.05 * alone, told
