"""Images that were collected come back for real clients, by their digests."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from chandlery.oci.documents import OCI_MANIFEST
from tests.support.clients import Containerd, Docker, Podman, Skopeo
from tests.support.package_sets import SOURCE
from tests.support.servers import LIMIT, RunningServer, environment, serving

# They use the server of conftest.py, as do other tests of this group.
pytestmark = pytest.mark.xdist_group("daemons")


def collect_everything(data_dir: Path) -> None:
    settings = {
        "CHANDLERY_DATA_DIR": str(data_dir),
        "CHANDLERY_SOURCE": SOURCE,
        "CHANDLERY_DISK_LIMIT": "1",
        "CHANDLERY_GC_GRACE": "0.1",
    }
    argv = [sys.executable, "-m", "chandlery", "collect"]
    subprocess.run(argv, env=environment(**settings), check=True, timeout=LIMIT, capture_output=True)


def digest_of(server: RunningServer, name: str) -> str:
    response = httpx.get(
        f"{server.url}/v2/{name}/manifests/latest", headers={"accept": OCI_MANIFEST}, timeout=LIMIT
    )
    digest: str = response.headers["docker-content-digest"]
    return digest


def test_every_client_pulls_a_collected_image_by_its_digest(
    tmp_path: Path, docker: Docker, containerd: Containerd, podman: Podman, skopeo: Skopeo
) -> None:
    data_dir = tmp_path / "data"
    with serving(data_dir, SOURCE, tmp_path / "log") as server:
        address = server.url.removeprefix("http://")
        # An image for each client, so that none has its layers already.
        pulls: dict[str, Callable[[str], object]] = {
            "greeter": docker.pull,
            "assembly": containerd.pull,
            "application": podman.pull,
            "suite": lambda image: skopeo.copy(image, f"dir:{tmp_path / 'copied'}"),
        }
        digests = {name: digest_of(server, name) for name in pulls}
        collect_everything(data_dir)
        left = list(data_dir.glob("blobs/sha256/*/*"))
        for name, pull in pulls.items():
            assert not [file for file in left if file.name == digests[name].removeprefix("sha256:")]
            pull(f"{address}/{name}@{digests[name]}")
        manifest = json.loads((tmp_path / "copied" / "manifest.json").read_text())
        assert len(manifest["layers"]) > 1
