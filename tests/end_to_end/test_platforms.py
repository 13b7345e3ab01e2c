"""A name that chooses no platform, and profiles, as clients see them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chandlery.oci.documents import OCI_INDEX, Platform
from tests.support.clients import Containerd, Docker, Engine, Podman, Skopeo
from tests.support.layouts import machine_of
from tests.support.running import Server
from tests.support.servers import RunningServer, serving

# They use the server of conftest.py, as do other tests of this group.
pytestmark = pytest.mark.xdist_group("daemons")


HOST = Platform.of_host().architecture
[OTHER] = {"amd64", "arm64"} - {HOST}
_ELF_MACHINE = {"amd64": 62, "arm64": 183}  # e_machine, elf(5)


@pytest.fixture(scope="module")
def image(server: Server) -> str:
    return server.image("git/jq")


def test_skopeo_sees_both_platforms_in_an_index(skopeo: Skopeo, image: str) -> None:
    index = json.loads(skopeo.manifest(image))
    assert index["mediaType"] == OCI_INDEX
    assert {each["platform"]["architecture"] for each in index["manifests"]} == {"amd64", "arm64"}


def test_docker_pulls_a_plain_name_and_runs_it(docker: Docker, image: str) -> None:
    docker.pull(image)
    assert docker.run(image, "jq", "--version").startswith("jq-")


def test_containerd_gets_the_platform_that_it_asks_for(containerd: Containerd, image: str) -> None:
    containerd.pull(image, platform=f"linux/{OTHER}")
    with containerd.mounted(image, f"linux/{OTHER}") as root:
        assert machine_of(root / "usr/bin/jq") == _ELF_MACHINE[OTHER]
    containerd.pull(image)
    assert containerd.run(image, "jq", "--version").startswith("jq-")


@pytest.mark.parametrize("platform", ["linux/arm64", "linux/arm64/v8"])
def test_every_client_finds_arm64_by_its_variant_too(
    docker: Docker, containerd: Containerd, podman: Podman, skopeo: Skopeo, image: str, platform: str
) -> None:
    # The index has no variant (decision 16).
    entries = [each["platform"] for each in json.loads(skopeo.manifest(image))["manifests"]]
    assert {"architecture": "arm64", "os": "linux"} in entries
    assert json.loads(skopeo.config_of(image, platform))["architecture"] == "arm64"
    podman.pull(image, platform=platform)
    assert podman.inspect(image)["Architecture"] == "arm64"
    docker.pull(image, platform=platform)
    assert docker.inspect(image)["Architecture"] == "arm64"
    containerd.pull(image, platform=platform)
    with containerd.mounted(image, platform) as root:
        assert machine_of(root / "usr/bin/jq") == _ELF_MACHINE["arm64"]


def test_podman_gets_the_platform_of_its_machine(podman: Podman, image: str) -> None:
    podman.pull(image)
    assert podman.inspect(image)["Architecture"] == HOST


def test_a_name_with_a_platform_is_one_manifest(skopeo: Skopeo, server: Server) -> None:
    assert "layers" in json.loads(skopeo.manifest(server.image(f"{OTHER}/git/jq")))


def test_an_image_tells_what_it_is_and_of_which_revision(skopeo: Skopeo, server: Server) -> None:
    manifest = json.loads(skopeo.manifest(server.image(f"{HOST}/jq")))
    annotations = named(manifest["annotations"])
    assert annotations["title"] == "jq"
    assert annotations["description"] == f"jq {annotations['version']}"
    assert annotations["source"] == "debian!trixie"
    assert annotations["revision"][:16] in skopeo.list_tags(
        server.image(f"{HOST}/jq").removesuffix(":latest")
    )
    config = json.loads(skopeo.config(server.image(f"{HOST}/jq")))["config"]
    assert named(config["Labels"]) == annotations


def named(labels: dict[str, str]) -> dict[str, str]:
    prefix = "org.opencontainers.image."
    assert all(name.startswith(prefix) for name in labels)
    return {name.removeprefix(prefix): value for name, value in labels.items()}


def test_nonroot_is_nobody_special(engine: Engine, server: Server) -> None:
    image = server.image(f"{HOST}/nonroot/shell")
    engine.pull(image)
    script = "id --user; id --user --name; echo $HOME; touch ~/file && pwd; ls /root || echo refused"
    said = engine.run(image, "bash", "-c", script)
    assert said.splitlines() == ["65532", "nonroot", "/home/nonroot", "/home/nonroot", "refused"]


@pytest.fixture(scope="module")
def configured(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A second server on the data folder of the first, with a settings file."""
    folder = tmp_path_factory.mktemp("configured")
    settings = folder / "chandlery.toml"
    settings.write_text(
        """
        platforms = ["amd64"]

        [sources]
        ours = "debian!trixie"

        [profiles.jq-service]
        packages = ["jq"]
        user = "1000:100"
        entrypoint = ["/usr/bin/jq"]
        command = ["--version"]
        environment = { GREETING = "hello there" }
        working_directory = "/tmp"
        exposed_ports = ["8080"]
        labels = { "com.example.team" = "platform" }
        """
    )
    variables = {"CHANDLERY_SETTINGS": str(settings)}
    with serving(server.data_dir, "debian!trixie", folder / "log", variables=variables) as running:
        yield running


def test_a_profile_says_what_is_started_and_how(
    docker: Docker, skopeo: Skopeo, configured: RunningServer
) -> None:
    image = f"{configured.url.removeprefix('http://')}/jq-service:latest"
    described: dict[str, Any] = json.loads(skopeo.config(image))["config"]
    assert described["Entrypoint"] == ["/usr/bin/jq"]
    assert described["Cmd"] == ["--version"]
    assert described["User"] == "1000:100"
    assert described["WorkingDir"] == "/tmp"
    assert described["ExposedPorts"] == {"8080/tcp": {}}
    assert described["Labels"]["com.example.team"] == "platform"
    assert "GREETING=hello there" in described["Env"]
    docker.pull(image)
    assert docker.run(image).startswith("jq-")
    assert docker.run(image, "--null-input", "env.GREETING") == '"hello there"\n'


def test_a_source_is_picked_by_the_first_part(skopeo: Skopeo, configured: RunningServer) -> None:
    address = configured.url.removeprefix("http://")
    named, plain = (skopeo.inspect(f"{address}/{name}:latest")["Digest"] for name in ("ours/jq", "jq"))
    # The same package set, so the same image.
    assert named == plain
