"""Image names that choose no platform: an index of all platforms that have the packages."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from chandlery.builds.images import Pulled
from chandlery.errors import (
    BuildPendingError,
    PackagesNotFoundError,
    PinPendingError,
    ReferenceNotFoundError,
    SourceUnavailableError,
)
from chandlery.image import name as image_name
from chandlery.image.name import NamePrefixes
from chandlery.machine.deadline import NO_DEADLINE, Deadline
from chandlery.maintenance.repaired_blobs import RepairedBlobs
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import DOCKER_MANIFEST_LIST, OCI_INDEX, ManifestFormat, Platform
from chandlery.sources.package_source import PackageSource
from tests.support.nix_package_set import source_of
from tests.support.workshop import Workshop, opened

pytestmark = pytest.mark.asyncio(loop_scope="module")

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")
NAME_PREFIXES = NamePrefixes(AMD64)

SET = """
{ system }: let
  build = name: script: derivation {
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/bash";
    # Nix kills a builder that closes its output, so bash ends last.
    args = [ "-euc" "PATH=/bin; ${script}\nexit" ];
    __impureHostDeps = [ "/bin" "/usr" "/lib" "/lib64" ];
  };
in rec {
  everywhere = build "everywhere" "echo ${system} > $out";
  cacert = build "cacert" "mkdir $out"; iana-etc = build "iana-etc" "mkdir $out";
  fails-on-arm64 = if system == "aarch64-linux" then build "fails" "exit 3" else everywhere;
  no-licence-on-arm64 = if system == "aarch64-linux" then throw "no licence" else everywhere;
} // (if system == "x86_64-linux" then {
  only-amd64 = build "only-amd64" "mkdir $out";
} else {
  only-arm64 = build "only-arm64" "mkdir $out";
})
"""


class BothPlatforms:
    """A package set of two platforms, of which each can be gone."""

    text, kind, location = "path!set", "path", "set"
    platforms = (AMD64, ARM64)

    def __init__(self, pin: PinnedSource) -> None:
        self._pin = pin
        self.stale = ""
        self.answers = asyncio.Event()
        self.answers.set()
        self.errors: dict[Platform, Exception] = {}
        self.others: dict[str, PinnedSource] = {}  # what other tags than the latest mean

    def serves(self, location: str) -> bool:
        return location == self.location

    async def upstreams(self) -> Sequence[str]:
        return ()

    async def pin(self, reference: str, platform: Platform) -> PinnedSource:
        await self.answers.wait()
        if platform in self.errors:
            raise self.errors[platform]
        if reference not in ("latest", self._pin.tag):
            if reference not in self.others:
                raise ReferenceNotFoundError(self.text, reference, "there is latest")
            return self.others[reference]
        return replace(self._pin, stale=self.stale)

    def chosen_by(self, reference: str, pin: PinnedSource | None = None) -> str:
        return ""

    def move(self, pin: PinnedSource) -> None:
        """Be at another revision from now on; the tag of the one before goes on meaning it."""
        self.others[self._pin.tag] = self._pin
        self._pin = pin

    async def at(self, revision: str, platform: Platform) -> PinnedSource | None:
        return self._pin if revision == self._pin.revision else None

    async def refresh(self, max_age: float) -> None: ...

    def keep(self, revisions: Sequence[str]) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("used")


@pytest.fixture
def source(folder: Path) -> BothPlatforms:
    return BothPlatforms(source_of(folder / "set", SET))


@pytest_asyncio.fixture(loop_scope="module")
async def shop(folder: Path, source: BothPlatforms) -> AsyncIterator[Workshop]:
    as_source: PackageSource = source
    async with opened(folder, source=as_source) as workshop:
        yield workshop


async def pull(shop: Workshop, name: str, timeout: float | None = None, reference: str = "latest") -> Pulled:
    request = image_name.parse(name, reference, NAME_PREFIXES)
    return await shop.images.pull(request, deadline=Deadline.after(timeout), index=True)


def document(shop: Workshop, pulled: Pulled, manifest_format: ManifestFormat = ManifestFormat.OCI) -> Any:
    return json.loads(shop.blobs.path(pulled.manifests[manifest_format].digest).read_bytes())


def architectures(index: Mapping[str, Any]) -> list[str]:
    return [each["platform"]["architecture"] for each in index["manifests"]]


async def test_an_index_lists_the_image_of_each_platform_in_each_format(shop: Workshop) -> None:
    pulled = await pull(shop, "everywhere")
    assert pulled.is_index
    assert pulled.warnings == ()
    for manifest_format, media_type in zip(ManifestFormat, (OCI_INDEX, DOCKER_MANIFEST_LIST), strict=True):
        index = document(shop, pulled, manifest_format)
        assert (index["schemaVersion"], index["mediaType"]) == (2, media_type)
        assert architectures(index) == ["amd64", "arm64"]
        for entry, name in zip(index["manifests"], ("amd64/everywhere", "arm64/everywhere"), strict=True):
            alone = await pull(shop, name)
            assert not alone.is_index
            descriptor = alone.manifests[manifest_format]
            assert (entry["digest"], entry["size"]) == (str(descriptor.digest), descriptor.size)
            assert entry["mediaType"] == descriptor.media_type
            assert entry["platform"]["os"] == "linux"


async def test_the_same_index_has_the_same_bytes(shop: Workshop) -> None:
    assert (await pull(shop, "everywhere")).manifests == (await pull(shop, "everywhere")).manifests


@pytest.mark.parametrize(
    ("name", "has", "why"),
    [
        ("only-amd64", "amd64", "there is no image for linux/arm64: not in the package set: only-amd64"),
        ("only-arm64", "arm64", "there is no image for linux/amd64: not in the package set: only-arm64"),
        ("fails-on-arm64", "amd64", "there is no image for linux/arm64: fails"),
        ("no-licence-on-arm64", "amd64", "there is no image for linux/arm64: no-licence-on-arm64"),
    ],
)
async def test_a_platform_that_lacks_a_package_is_left_out(
    shop: Workshop, name: str, has: str, why: str
) -> None:
    pulled = await pull(shop, name)
    assert architectures(document(shop, pulled)) == [has]
    [warning] = pulled.warnings
    assert warning.startswith(why)


async def test_what_no_platform_has_is_told_once(shop: Workshop) -> None:
    with pytest.raises(PackagesNotFoundError, match="not in the package set: evrywhere"):
        await pull(shop, "evrywhere")
    with pytest.raises(PackagesNotFoundError):
        await pull(shop, "only-amd64/only-arm64")


async def test_a_reference_that_one_platform_lacks_leaves_it_out(
    shop: Workshop, source: BothPlatforms
) -> None:
    source.errors[ARM64] = ReferenceNotFoundError("path!set", "abc", "there is latest")
    assert architectures(document(shop, await pull(shop, "everywhere"))) == ["amd64"]


async def test_what_may_be_better_next_time_fails_the_pull(shop: Workshop, source: BothPlatforms) -> None:
    source.errors[ARM64] = SourceUnavailableError("path!set", "the mirror is dead")
    with pytest.raises(SourceUnavailableError):
        await pull(shop, "everywhere")
    # Also if the other platform lacks a package.
    with pytest.raises(SourceUnavailableError):
        await pull(shop, "only-arm64")


async def test_one_platform_still_being_built_is_waited_for(shop: Workshop) -> None:
    with pytest.raises(BuildPendingError):
        await pull(shop, "everywhere/only-amd64", timeout=0.0)
    await pull(shop, "everywhere/only-amd64")


async def test_a_platform_that_lacks_a_package_does_not_hide_that_another_is_being_built(
    shop: Workshop,
) -> None:
    with pytest.raises(PackagesNotFoundError):
        await pull(shop, "amd64/only-arm64/everywhere")
    # What failed a moment ago is told at once, and the build takes longer than nothing.
    with pytest.raises(BuildPendingError):
        await pull(shop, "only-arm64/everywhere", timeout=0.0)
    assert architectures(document(shop, await pull(shop, "only-arm64/everywhere"))) == ["arm64"]


async def test_a_source_that_takes_long_is_not_waited_for_longer_than_a_build(
    shop: Workshop, source: BothPlatforms
) -> None:
    source.answers.clear()
    with pytest.raises(PinPendingError, match="path!set is still being looked up for everywhere"):
        await pull(shop, "everywhere", timeout=0.01)


async def test_a_stale_pin_is_told_once(shop: Workshop, source: BothPlatforms) -> None:
    source.stale = "the mirror is dead since noon"
    assert (await pull(shop, "everywhere")).warnings == (source.stale,)
    assert (await pull(shop, "amd64/everywhere")).warnings == (source.stale,)


async def test_who_takes_no_index_gets_the_hosts_image(shop: Workshop) -> None:
    request = image_name.parse("everywhere", "latest", NAME_PREFIXES)
    pulled = await shop.images.pull(request)
    assert pulled == await pull(shop, "amd64/everywhere")


async def test_an_index_that_was_collected_is_given_again(shop: Workshop) -> None:
    pulled = await pull(shop, "everywhere")
    digest = pulled.manifests[ManifestFormat.OCI].digest
    content = shop.blobs.path(digest).read_bytes()
    await shop.blobs.delete(digest)
    async with shop.leases.lease() as lease:
        repaired = RepairedBlobs(shop.stores, shop.images, lease)
        info = await repaired.obtain(digest, NO_DEADLINE)
        assert info is not None
        assert info.size == len(content)
        assert b"".join([part async for part in repaired.read(digest)]) == content


async def test_both_platforms_are_built_at_once(shop: Workshop) -> None:
    pulls = [pull(shop, "everywhere/fails-on-arm64") for _ in range(5)]
    results = await asyncio.gather(*pulls)
    assert len({result.manifests[ManifestFormat.OCI].digest for result in results}) == 1


# Tags


async def listed(shop: Workshop, name: str) -> dict[str, list[str]]:
    """Return the tags of a name, each with the platforms that are pulled by it."""
    tags = await shop.images.tags(image_name.parse(name, "latest", NAME_PREFIXES))
    pulled = {tag: document(shop, await pull(shop, name, reference=tag)) for tag in tags}
    return {
        tag: architectures(each) if "manifests" in each else [architecture_of(shop, each)]
        for tag, each in pulled.items()
    }


def architecture_of(shop: Workshop, manifest: Mapping[str, Any]) -> str:
    config = shop.blobs.path(Digest.parse(manifest["config"]["digest"]))
    return str(json.loads(config.read_bytes())["architecture"])


def another(folder: Path, text: str) -> PinnedSource:
    """Return the package set at another revision, whose packages have another content."""
    pin = source_of(folder / f"set-{text}", SET.replace("echo ${system}", f"echo {text} ${{system}}"))
    return replace(pin, location="set")


async def test_each_tag_that_is_listed_pulls_for_the_platforms_of_latest(
    shop: Workshop, source: BothPlatforms, folder: Path
) -> None:
    first, second, third = another(folder, "1st"), another(folder, "2nd"), another(folder, "3rd")
    source.move(first)
    await pull(shop, "everywhere")
    source.move(second)
    await pull(shop, "amd64/everywhere")
    source.move(third)
    # Whatever was built, and for whom: the second has no image for arm64.
    everywhere = await listed(shop, "everywhere")
    assert {first.tag, third.tag, "latest"} <= everywhere.keys()
    assert second.tag not in everywhere
    assert all(platforms == ["amd64", "arm64"] for platforms in everywhere.values())
    for name, has, has_not in [
        ("arm64", {first.tag}, {second.tag}),
        ("amd64", {first.tag, second.tag}, set()),
    ]:
        alone = await listed(shop, f"{name}/everywhere")
        assert has | {"latest", third.tag} <= alone.keys()
        assert not has_not & alone.keys()
        assert all(platforms == [name] for platforms in alone.values())


async def test_a_tag_is_not_listed_for_a_platform_whose_image_was_never_made(
    shop: Workshop, source: BothPlatforms, folder: Path
) -> None:
    alone = await source.pin("latest", AMD64)
    await pull(shop, "amd64/everywhere/no-licence-on-arm64")
    source.move(another(folder, "fourth"))
    name = "amd64/everywhere/no-licence-on-arm64"
    assert alone.tag in await listed(shop, name)
    assert alone.tag not in await listed(shop, "everywhere/no-licence-on-arm64")


async def test_where_a_platform_is_left_out_tags_are_listed_that_leave_it_out_too(
    shop: Workshop, source: BothPlatforms, folder: Path
) -> None:
    before = await source.pin("latest", AMD64)
    await pull(shop, "only-amd64")
    source.move(another(folder, "fifth"))
    now = await source.pin("latest", AMD64)
    found = await listed(shop, "only-amd64")
    assert found.keys() == {"latest", before.tag, now.tag}
    assert all(platforms == ["amd64"] for platforms in found.values())


async def test_an_image_that_one_platform_lacked_then_is_not_listed_where_both_have_it_now(
    shop: Workshop, source: BothPlatforms, folder: Path
) -> None:
    before = await source.pin("latest", AMD64)
    await pull(shop, "fails-on-arm64")
    mended = source_of(folder / "set-mended", SET.replace("exit 3", "echo ${system} > $out"))
    source.move(replace(mended, location="set"))
    found = await listed(shop, "fails-on-arm64")
    assert before.tag not in found
    assert found["latest"] == ["amd64", "arm64"]


async def test_the_name_of_what_only_the_other_platform_has_has_tags(shop: Workshop) -> None:
    assert "latest" in await listed(shop, "only-arm64")
    with pytest.raises(PackagesNotFoundError):
        await listed(shop, "amd64/only-arm64")


async def test_a_tag_that_means_nothing_any_more_is_not_listed(
    shop: Workshop, source: BothPlatforms, folder: Path
) -> None:
    source.others["branch"] = another(folder, "branch")
    await pull(shop, "amd64/everywhere", reference="branch")
    assert "branch" in await listed(shop, "amd64/everywhere")
    # It is something else now, that nobody has built yet.
    source.others["branch"] = another(folder, "moved")
    assert "branch" not in await listed(shop, "amd64/everywhere")
    del source.others["branch"]
    assert "branch" not in await listed(shop, "amd64/everywhere")


async def test_an_image_that_was_collected_has_no_tag_but_the_latest(
    shop: Workshop, source: BothPlatforms, folder: Path
) -> None:
    pulled = await pull(shop, "amd64/everywhere")
    source.move(another(folder, "after"))
    assert pulled.pin.tag in await listed(shop, "amd64/everywhere")
    await shop.index.forget_image(pulled.recipes[0].key, float("inf"))
    assert pulled.pin.tag not in await listed(shop, "amd64/everywhere")


async def test_an_index_is_of_one_revision_though_the_source_moves_between_its_platforms(
    shop: Workshop, source: BothPlatforms, folder: Path
) -> None:
    newer = another(folder, "newer")

    async def pin(reference: str, platform: Platform) -> PinnedSource:
        found = await BothPlatforms.pin(source, reference, platform)
        if found != newer:
            source.move(newer)
        return found

    shop_source: Any = source
    shop_source.pin = pin
    pulled = await pull(shop, "everywhere")
    assert {each.pin.revision for each in pulled.recipes} == {newer.revision}
    assert len(pulled.recipes) == 2
