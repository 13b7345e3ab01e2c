"""Who copies all tags of a name, as skopeo and crane do, gets each for the platforms that `latest` has."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import Skopeo
from tests.support.debian_packages import PACKAGES, Deb
from tests.support.debian_repository import SECURITY, SUITE, DebianRepository, debian_repository
from tests.support.running import require
from tests.support.servers import RunningServer, serving, wait_until

BOTH = {"amd64", "arm64"}


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[DebianRepository]:
    with debian_repository(tmp_path) as repository:
        repository.by_hash = True
        repository.publish(*PACKAGES, Deb("only-amd64", architecture="any"), architectures=["amd64"])
        repository.publish(*PACKAGES, architectures=["arm64"])
        yield repository


@pytest.fixture
def server(tmp_path: Path, repository: DebianRepository) -> Iterator[RunningServer]:
    require("nix", root=False)
    mirrors = repository.mirrors
    variables = {
        "CHANDLERY_DEBIAN_MIRROR": mirrors.main,
        "CHANDLERY_DEBIAN_SECURITY_MIRROR": mirrors.security,
        "CHANDLERY_DEBIAN_KEYRING": mirrors.keyring,
        "CHANDLERY_SOURCE_REFRESH": "1",
    }
    with serving(tmp_path / "data", f"debian!{SUITE}", tmp_path / "log", variables=variables) as running:
        yield running


def test_all_tags_of_a_name_are_copied_with_all_platforms(
    skopeo: Skopeo, server: RunningServer, repository: DebianRepository, tmp_path: Path
) -> None:
    address = server.url.removeprefix("http://")

    def revision(name: str) -> str:
        """Pull a name, for its platform or for all that there are, and return the revision."""
        folder = tmp_path / "pulled"
        skopeo.copy_all(f"{address}/{name}:latest", f"dir:{folder}")
        with (folder / "manifest.json").open() as file:
            manifest = json.load(file)
        if "annotations" in manifest:
            annotations = manifest["annotations"]
        else:
            digest = manifest["manifests"][0]["digest"].removeprefix("sha256:")
            annotations = json.loads((folder / f"{digest}.manifest.json").read_text())["annotations"]
        return str(annotations["org.opencontainers.image.revision"])[:16]

    def moves(before: str) -> str:
        """Wait until the server has what was published; nobody pulls for the other platform meanwhile."""
        wait_until(lambda: revision("amd64/mawk") != before)
        return revision("amd64/mawk")

    first = revision("mawk")
    repository.publish(Deb("new", architecture="any"), release=SECURITY, architectures=["arm64"])
    second = moves(first)
    repository.publish(Deb("new", architecture="any"), release=SECURITY, architectures=["amd64"])
    third = moves(second)

    for name, tags in [
        ("mawk", {"latest", first, third}),
        ("amd64/mawk", {"latest", first, second, third}),
        ("arm64/mawk", {"latest", first, third}),
    ]:
        assert set(skopeo.list_tags(f"{address}/{name}")) == tags
        folder = tmp_path / name.replace("/", "-")
        skopeo.sync(f"{address}/{name}", folder)
        assert {path.name.partition(":")[2] for path in folder.rglob("*:*")} == tags
        for tag in tags:
            skopeo.copy_all(f"{address}/{name}:{tag}", f"dir:{folder}/copied-{tag}")
            manifest = json.loads(skopeo.manifest(f"{address}/{name}:{tag}"))
            listed = {each["platform"]["architecture"] for each in manifest.get("manifests", [])}
            assert listed == (BOTH if name == "mawk" else set())

    # What one platform lacks is an index of the other, by each of its tags.
    assert revision("only-amd64") == third
    assert set(skopeo.list_tags(f"{address}/only-amd64")) == {"latest", third}
    skopeo.sync(f"{address}/only-amd64", tmp_path / "only-amd64")
