"""Layers of a small suite have the digests that are recorded here, on every machine.

Nothing moves in the suite, so what differs is Chandlery's work, or that of Python, Nix or the Debian
beneath. The digests change only with a version that is counted up (CONTRIBUTING.md, "Digests that must not
change").
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from chandlery.builds.recipe import BuildOptions
from chandlery.layers.compression import COMPRESSIONS
from chandlery.oci.digest import Digest
from chandlery.oci.documents import Platform
from chandlery.sources.debian.source import DebianSource
from tests.support import workshop
from tests.support.debian_packages import PACKAGES
from tests.support.debian_repository import SUITE, DebianRepository, debian_repository
from tests.support.nix_package_set import requires_nix

NAMES = ("bash", "git", "passwd", "vim-tiny", "original-awk")

# Of all layers' digests, one below the other, the first eight digits of the sha256.
RECORDED = {
    "amd64": {"none": "068e095a", "gzip": "ef781c1f", "zstd": "9e9d0780"},
    "arm64": {"none": "08a379fe", "gzip": "632a86dd", "zstd": "3d3675e6"},
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianRepository]:
    with debian_repository(tmp_path_factory.mktemp("repository")) as repository:
        repository.publish(*PACKAGES)
        yield repository


@requires_nix
async def test_layers_have_the_digests_that_are_recorded(
    repository: DebianRepository, tmp_path: Path
) -> None:
    found: dict[str, dict[str, str]] = {architecture: {} for architecture in RECORDED}
    for compression in COMPRESSIONS:
        options = BuildOptions(compression=compression)
        source = DebianSource(SUITE, tmp_path / "debian", repository.mirrors)
        async with workshop.opened(tmp_path, options=options, source=source) as shop:
            for architecture, digests in found.items():
                request = replace(workshop.a_request(*NAMES), platform=Platform("linux", architecture))
                image = await shop.images.image(request)
                texts = "".join(f"{layer.descriptor.digest}\n" for layer in image.layers)
                digests[compression] = Digest.of(texts.encode()).hex[:8]
        await source.close()
    assert found == RECORDED
