"""The suites of Debian that people name: what is in each changes its shape before anybody tells."""

from pathlib import Path

import pytest

from chandlery.demo.sandbox import unpack
from tests.support.clients import Containerd, Skopeo
from tests.support.layouts import ELF_AARCH64, blobs_of, machine_of
from tests.support.running import Server

# They use the server of conftest.py, whose default is the stable suite; test_clients.py has most about that.
pytestmark = pytest.mark.xdist_group("daemons")


@pytest.mark.parametrize("suite", ["bookworm", "sid"])
def test_a_suite_has_images_that_run(
    containerd: Containerd, skopeo: Skopeo, server: Server, tmp_path: Path, suite: str
) -> None:
    image = server.image("amd64/shell/git/jq/curl", suite)
    containerd.pull(image)
    assert containerd.run(image, "git", "--version").startswith("git version ")
    script = "echo '{\"a\": 1}' | jq .a && curl --version | head --lines 1 && cat /etc/os-release"
    assert containerd.run(image, "bash", "-c", script).startswith("1\ncurl ")

    layout, root = tmp_path / "layout", tmp_path / "root"
    skopeo.copy(server.image("arm64/shell/jq", suite), f"oci:{layout}:latest")
    _, *layers = blobs_of(layout)
    unpack(layers, root)
    assert machine_of(root / "usr/bin/jq") == machine_of(root / "usr/bin/bash") == ELF_AARCH64
