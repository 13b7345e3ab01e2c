"""Nixery's variables, as its newest version reads them (config/config.go, config/pkgsource.go, storage/)."""

import re
import subprocess
import sys
from pathlib import Path

from chandlery.demo import registry_client
from chandlery.oci.documents import ARCHITECTURES, Platform
from tests.support import layers
from tests.support.nix_package_set import NIXPKGS_SHAPE
from tests.support.package_sets import PACKAGE_SET, Gates
from tests.support.servers import LIMIT, environment, free_port, serving_with_variables


def test_a_server_that_was_configured_for_nixery_serves(tmp_path: Path) -> None:
    port = free_port()
    storage = tmp_path / "storage"
    variables = {
        "PORT": str(port),
        "NIXERY_PKGS_PATH": str(NIXPKGS_SHAPE),
        "NIXERY_STORAGE_BACKEND": "filesystem",
        "STORAGE_PATH": str(storage),
        "NIX_TIMEOUT": "60",
        "WEB_DIR": "/web",
    }
    # Names as Nixery takes them: meta-packages, any order, sets with capitals in lower case.
    names = {
        "hello": "hello",
        "shell/jq/hello": "hello",
        "python3packages.numpy": "numpy",
        "arm64/shell/jq": "jq",
        "shell/arm64/jq": "jq",
        "amd64/sdl2": "SDL2",
    }
    with serving_with_variables(variables, port, tmp_path / "log") as server:
        for number, (name, program) in enumerate(names.items()):
            pulled = registry_client.pull(server.url, name, "latest", tmp_path / str(number), LIMIT)
            asked = next((each for each in ARCHITECTURES if each in name), Platform.of_host().architecture)
            assert pulled.config["architecture"] == asked
            assert f"bin/{program}" in layers.layer(pulled.layers[-1]).getnames()
        assert server.get("/v2/shell/nothing-so-called/manifests/latest").status_code == 404
    assert (storage / "chandlery" / "blobs").is_dir()
    log = (tmp_path / "log").read_text()
    assert "listens at 0.0.0.0" in log
    assert "WEB_DIR means nothing here" in log


def test_nixerys_limit_is_one_of_each_builder(tmp_path: Path) -> None:
    Gates(tmp_path / "gates", tmp_path / "chandlery")
    finished = subprocess.run(
        [sys.executable, "-m", "chandlery", "build", "waiting-a"],
        env=environment(
            NIXERY_PKGS_PATH=str(PACKAGE_SET),
            NIXERY_STORAGE_BACKEND="filesystem",
            STORAGE_PATH=str(tmp_path),
            NIX_TIMEOUT="1",
        ),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert finished.returncode == 1
    # Nix 2.34 doesn't say which of an image's packages it was.
    told = "(waiting-a-1.0|image-waiting-a) could not be built: it was stopped after 1 s, the limit on this"
    assert re.search(told, finished.stderr)
