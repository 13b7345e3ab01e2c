import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from chandlery.builds.build_queue import SELF_REPAIR, QueueLimits
from chandlery.builds.images import BuildCapacity
from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.errors import BlobNotFoundError, BuildPendingError, RateLimitError
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.machine.deadline import Deadline
from chandlery.maintenance.repaired_blobs import RepairedBlobs
from chandlery.oci.digest import Digest
from chandlery.oci.documents import OCI_LAYER, BuiltImage, Descriptor
from chandlery.plan.popularity import Popularity
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.kinds import parse
from chandlery.sources.package_source import PackageSource
from chandlery.storage.blob_store import BlobInfo
from tests.support import layers
from tests.support.damage import a_blob, cut, flip, lose
from tests.support.workshop import Workshop, a_request, opened

# One event loop for all of them: the processes that pack belong to it, and take half a second to start.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Repairs:
    workshop: Workshop
    blobs: RepairedBlobs
    hold: float | None

    async def obtain(self, digest: Digest) -> BlobInfo | None:
        return await self.blobs.obtain(digest, Deadline.after(self.hold))

    def file(self, digest: Digest) -> Path:
        return self.workshop.blobs.path(digest)

    def builds(self) -> int:
        return len(self.workshop.images.queue.builds())


@asynccontextmanager
async def repairing(
    folder: Path,
    *,
    hold: float | None = 60.0,
    options: BuildOptions | None = None,
    capacity: BuildCapacity | None = None,
    source: PackageSource | None = None,
    popularity: Popularity | None = None,
) -> AsyncIterator[Repairs]:
    async with (
        opened(folder, options=options, capacity=capacity, source=source, popularity=popularity) as workshop,
        workshop.leases.lease() as lease,
    ):
        yield Repairs(workshop, RepairedBlobs(workshop.stores, workshop.images, lease), hold)


@pytest.fixture(scope="module")
def used_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("used")


@pytest_asyncio.fixture(loop_scope="module")
async def used(used_folder: Path) -> AsyncIterator[Repairs]:
    async with repairing(used_folder) as repairs:
        yield repairs


each_blob = pytest.mark.parametrize("which", ["manifest", "docker manifest", "config", "layer", "root layer"])


@each_blob
@pytest.mark.parametrize("damage", [lose, cut])
async def test_a_blob_that_is_missing_or_has_another_size_comes_back_with_its_digest(
    used: Repairs, which: str, damage: Callable[[Path], None]
) -> None:
    digest = a_blob(await used.workshop.image("hello"), which)
    size = used.file(digest).stat().st_size
    damage(used.file(digest))
    assert await used.obtain(digest) == BlobInfo(size)
    assert Digest.of(used.file(digest).read_bytes()) == digest


@each_blob
async def test_a_blob_that_is_in_doubt_is_checked_before_it_is_given(used: Repairs, which: str) -> None:
    digest = a_blob(await used.workshop.image("hello"), which)
    flip(used.file(digest))
    used.blobs.in_doubt.add(digest)
    await used.obtain(digest)
    assert Digest.of(used.file(digest).read_bytes()) == digest
    assert not used.blobs.in_doubt


async def test_a_blob_in_doubt_that_is_whole_is_given_without_a_build(used: Repairs) -> None:
    digest = a_blob(await used.workshop.image("hello"), "layer")
    built = used.builds()
    used.blobs.in_doubt.add(digest)
    assert await used.obtain(digest)
    assert not used.blobs.in_doubt
    assert used.builds() == built


async def test_a_manifest_is_given_only_when_its_whole_image_is_there(used: Repairs) -> None:
    image = await used.workshop.image("greeter")
    for each in image.layers:
        used.file(each.descriptor.digest).unlink()
    await used.obtain(a_blob(image, "manifest"))
    assert all(Digest.of(used.file(each.digest).read_bytes()) == each.digest for each in image.descriptors)


async def test_however_many_ask_for_blobs_of_an_image_it_is_built_once(used: Repairs) -> None:
    image = await used.workshop.image("greeter")
    built = used.builds()
    for each in image.descriptors:
        used.file(each.digest).unlink()
    await asyncio.gather(*(used.obtain(each.digest) for each in image.descriptors for _ in range(20)))
    assert used.builds() == built + 1
    assert used.workshop.images.queue.builds()[0].client == SELF_REPAIR


async def test_a_blob_that_goes_after_a_build_has_seen_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is found to be damaged while another blob of its image is being made again."""
    async with repairing(tmp_path) as repairs:
        image = await repairs.workshop.image("hello")
        remake, times = repairs.workshop.images.remake, iter(range(10))
        file = repairs.file(a_blob(image, "layer"))

        async def losing(recipe: Recipe, client: str, deadline: Deadline) -> BuiltImage:
            made = await remake(recipe, client, deadline)
            if next(times) == 0:
                file.unlink()
            return made

        monkeypatch.setattr(repairs.workshop.images, "remake", losing)
        file.unlink()
        assert await repairs.obtain(a_blob(image, "layer"))
        assert next(times) == 2


async def test_a_blob_in_doubt_that_goes_while_it_is_checked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the check after a crash finds it to be damaged at the same time."""
    async with repairing(tmp_path) as repairs:
        digest = a_blob(await repairs.workshop.image("hello"), "layer")
        repairs.blobs.in_doubt.add(digest)
        stat = repairs.workshop.blobs.stat

        async def losing(asked: Digest) -> BlobInfo | None:
            info = await stat(asked)
            if asked == digest:
                monkeypatch.setattr(repairs.workshop.blobs, "stat", stat)
                repairs.file(digest).unlink()
            return info

        monkeypatch.setattr(repairs.workshop.blobs, "stat", losing)
        assert await repairs.obtain(digest)
        assert Digest.of(repairs.file(digest).read_bytes()) == digest


async def test_a_blob_that_nobody_knows_is_not_there_and_builds_nothing(used: Repairs) -> None:
    built = used.builds()
    assert await used.obtain(Digest.of(b"never put")) is None
    assert used.builds() == built


async def test_who_waits_longer_than_the_hold_is_told_that_it_is_being_made(tmp_path: Path) -> None:
    async with repairing(tmp_path, hold=0.0) as repairs:
        image = await repairs.workshop.image("hello")
        digest = a_blob(image, "layer")
        repairs.file(digest).unlink()
        with pytest.raises(BuildPendingError):
            await repairs.obtain(digest)
        assert await repairs.workshop.image("hello") == image
        assert await repairs.obtain(digest)


async def test_an_image_that_was_made_with_other_options_is_made_again_with_those(tmp_path: Path) -> None:
    options = BuildOptions(3, "zstd", root_layer=RootLayerOptions(1000, 100, extra_commands="echo > it"))
    async with repairing(tmp_path, options=options) as before:
        image = await before.workshop.image("assembly")
    async with repairing(tmp_path) as repairs:
        for each in image.descriptors:
            repairs.file(each.digest).unlink()
        for each in image.descriptors:
            assert await repairs.obtain(each.digest) == BlobInfo(each.size)


# For whose account


async def test_what_was_collected_is_made_again_for_the_client_that_asks_and_what_was_lost_for_nobody(
    tmp_path: Path,
) -> None:
    admitted: list[str] = []

    def admit(client: str) -> None:
        if len(admitted) == 2:
            raise RateLimitError("builds", 2, "hour", 60)
        admitted.append(client)

    async with repairing(tmp_path, capacity=BuildCapacity(queue=QueueLimits(admit=admit))) as repairs:
        pulled = await repairs.workshop.images.pull(a_request("hello"), "puller")
        image = await repairs.workshop.image("hello")
        (recipe,) = pulled.recipes
        digest = a_blob(image, "manifest")

        async def obtain(client: str) -> BlobInfo | None:
            return await repairs.blobs.obtain(digest, Deadline.after(60.0), client)

        lose(repairs.file(digest))
        assert await obtain("other")
        assert admitted == ["puller"]
        for collected in range(2):
            assert await repairs.workshop.index.forget_image(recipe.key, float("inf"))
            for each in image.descriptors:
                repairs.file(each.digest).unlink()
            if not collected:
                assert await obtain("other")
                assert await obtain("another")
                assert repairs.workshop.images.queue.builds()[0].client == "other"
        with pytest.raises(RateLimitError):
            await obtain("another")
    assert admitted == ["puller", "other"]


# The table that an image was planned with

PARTS = [f"part-{number}" for number in range(12)]


def together(*names: str) -> Popularity:
    """Say that packages go together, whatever is needed more."""
    return Popularity(dict.fromkeys(PARTS, 1), dict.fromkeys(names, names[0]))


async def test_an_image_is_planned_with_the_operators_table(tmp_path: Path) -> None:
    async with repairing(tmp_path, popularity=together(*PARTS[:3])) as repairs:
        image = await repairs.workshop.image("assembly")
        contents = [
            {
                name.split("/")[2][33:]
                for name in layers.layer(repairs.workshop.blob(each)).getnames()
                if "-" in name
            }
            for each in image.layers[:-1]
        ]
        assert {f"{part}-1.0" for part in PARTS[:3]} in contents
        assert {f"{PARTS[3]}-1.0"} in contents


async def test_an_image_is_made_again_with_the_table_that_it_was_planned_with(tmp_path: Path) -> None:
    async with repairing(tmp_path, popularity=together(*PARTS[:3])) as before:
        image = await before.workshop.image("assembly")
    async with repairing(tmp_path, popularity=together(*PARTS[3:])) as repairs:
        other = await repairs.workshop.image("assembly")
        assert other.manifests != image.manifests
        for each in image.descriptors:
            repairs.file(each.digest).unlink()
        for each in image.descriptors:
            assert await repairs.obtain(each.digest) == BlobInfo(each.size)


async def test_without_its_table_an_image_is_not_made_again_as_another(tmp_path: Path) -> None:
    async with repairing(tmp_path, popularity=together(*PARTS[:3])) as before:
        image = await before.workshop.image("assembly")
    shutil.rmtree(tmp_path / "popularity")
    async with repairing(tmp_path) as repairs:
        digest = a_blob(image, "manifest")
        repairs.file(digest).unlink()
        with pytest.raises(BlobNotFoundError, match="is not kept any more"):
            await repairs.obtain(digest)
        assert (await repairs.workshop.image("assembly")).manifests != image.manifests


# What the source has no longer


PACKAGES = """
let
  package = name: derivation {
    name = "${name}-VERSION";
    system = builtins.currentSystem;
    builder = "/bin/bash";
    # The programs of this machine are not in the sandbox of a derivation that doesn't ask for them.
    __impureHostDeps =
      [ "/bin" "/usr" "/lib" ] ++ (if builtins.currentSystem == "x86_64-linux" then [ "/lib64" ] else [ ]);
    args = [ "-c" "/bin/mkdir $out; echo VERSION > $out/${name}; exit" ];
  };
in
{ hello = package "hello"; cacert = package "cacert"; iana-etc = package "iana-etc"; }
"""


class EditedFolder:
    """A package set that gets another revision, and of which no earlier one is kept."""

    def __init__(self, folder: Path) -> None:
        self._data_folder = folder
        self._folder = folder / "packages"
        self._folder.mkdir()
        self.edit("1")

    def edit(self, version: str) -> None:
        (self._folder / "default.nix").write_text(PACKAGES.replace("VERSION", version))
        for tree in self._data_folder.glob("sources/path-*/*/source"):
            shutil.rmtree(tree.parent)

    def source(self, data_folder: Path) -> PackageSource:
        return parse(f"path!{self._folder}", data_folder, DebianMirrors())


async def test_an_image_of_a_revision_that_is_gone_is_made_again_from_what_was_resolved(
    tmp_path: Path,
) -> None:
    folder = EditedFolder(tmp_path)
    async with repairing(tmp_path, source=folder.source(tmp_path)) as repairs:
        image = await repairs.workshop.image("hello")
        folder.edit("2")
        digest = a_blob(image, "layer")
        repairs.file(digest).unlink()
        assert await repairs.obtain(digest)
        assert Digest.of(repairs.file(digest).read_bytes()) == digest


async def test_what_can_not_be_evaluated_any_more_is_not_found_and_the_reason_is_told(tmp_path: Path) -> None:
    folder = EditedFolder(tmp_path)
    async with repairing(tmp_path, source=folder.source(tmp_path)) as repairs:
        image = await repairs.workshop.image("hello")
        revision = (await repairs.workshop.index.revisions(1))[0]
        folder.edit("2")
        await repairs.workshop.nix.collect_all_garbage()
        digest = a_blob(image, "layer")
        repairs.file(digest).unlink()
        with pytest.raises(BlobNotFoundError, match=f"revision {revision[:16]} is not kept") as caught:
            await repairs.obtain(digest)
        assert caught.value.digest == str(digest)
        # What the folder holds now was not taken for what it held then.
        newer = await repairs.workshop.image("hello")
        assert newer.layers != image.layers


async def test_what_was_made_again_and_is_another_image_now_is_not_found(tmp_path: Path) -> None:
    """As it is after an update that changes the bytes of layers."""
    async with repairing(tmp_path) as repairs:
        image = await repairs.workshop.image("hello")
        digest = a_blob(image, "layer")
        [recipe] = await repairs.workshop.index.recipes(digest, 1)
        other = Digest.of(b"as an earlier version packed it")
        layer = replace(image.layers[0], descriptor=Descriptor(OCI_LAYER, other, 7))
        await repairs.workshop.index.remember_image(recipe, replace(image, layers=(layer, *image.layers[1:])))
        with pytest.raises(BlobNotFoundError, match="is another image now"):
            await repairs.obtain(other)


# What is in use


async def test_asking_for_a_blob_is_a_use_of_the_image_that_was_used_last(used: Repairs) -> None:
    index = used.workshop.index
    await used.workshop.image("jq")
    image = await used.workshop.image("hello")
    await used.workshop.image("greeter")
    await used.obtain(a_blob(image, "root layer"))
    assert (await index.least_recently_used())[-1].name == "hello"


async def test_a_blob_that_no_image_needs_is_leased_while_it_is_opened(used: Repairs) -> None:
    descriptor = await used.workshop.blobs.put_bytes(b"an orphan", "text/plain")
    assert await used.obtain(descriptor.digest)
    assert await used.obtain(descriptor.digest)
    assert used.workshop.leases.leased() == {descriptor.digest}


async def test_a_blob_of_a_collected_image_that_is_still_there_is_given_without_a_build(
    used: Repairs,
) -> None:
    image = await used.workshop.image("jq")
    digest = a_blob(image, "layer")
    [jq] = [each for each in await used.workshop.index.least_recently_used() if each.name == "jq"]
    assert await used.workshop.index.forget_image(jq.key, float("inf"))
    built = used.builds()
    assert await used.obtain(a_blob(image, "root layer"))
    assert used.builds() == built
    assert a_blob(image, "root layer") in used.workshop.leases.leased()
    # The manifest promises all of the image.
    assert await used.obtain(a_blob(image, "manifest"))
    assert used.builds() == built + 1
    assert await used.workshop.image("jq") == image
    assert Digest.of(used.file(digest).read_bytes()) == digest
