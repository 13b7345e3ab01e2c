import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from chandlery.machine.deadline import NO_DEADLINE
from chandlery.maintenance.repaired_blobs import RepairedBlobs
from chandlery.maintenance.scrub import Finding, Problem, Scrub, written_since
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage
from chandlery.storage.blob_store import BlobInfo, is_intact
from tests.support.damage import a_blob, flip
from tests.support.memory_blob_store import MemoryBlobStore
from tests.support.workshop import Workshop, opened

# One event loop for all of them: the processes that pack belong to it, and take half a second to start.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Scrubbed:
    workshop: Workshop
    repaired: RepairedBlobs
    scrub: Scrub
    image: BuiltImage

    def file(self, which: str) -> Path:
        return self.workshop.blobs.path(self.digest(which))

    def digest(self, which: str) -> Digest:
        return a_blob(self.image, which)

    async def findings(self, *, repair: bool = True) -> Mapping[Digest, Finding]:
        return {each.digest: each async for each in self.scrub.findings(repair=repair)}


@pytest.fixture(scope="module")
def used_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("used")


@pytest_asyncio.fixture(loop_scope="module")
async def scrubbed(used_folder: Path) -> AsyncIterator[Scrubbed]:
    async with opened(used_folder) as workshop, workshop.leases.lease() as lease:
        image = await workshop.image("hello")
        repaired = RepairedBlobs(workshop.stores, workshop.images, lease)
        yield Scrubbed(workshop, repaired, Scrub(workshop.stores, repaired), image)


async def test_where_all_is_well_nothing_is_found_and_everything_is_counted(scrubbed: Scrubbed) -> None:
    assert await scrubbed.findings() == {}
    inventory = await scrubbed.workshop.blobs.inventory()
    assert scrubbed.scrub.blobs == len(inventory)
    assert scrubbed.scrub.bytes == sum(info.size for info in inventory.values())


async def test_damaged_blobs_are_found_and_made_again(scrubbed: Scrubbed) -> None:
    damaged = {scrubbed.digest("layer"), scrubbed.digest("manifest")}
    for digest in damaged:
        flip(scrubbed.workshop.blobs.path(digest))
    assert await scrubbed.findings() == {
        digest: Finding(digest, Problem.DAMAGED, "hello", "") for digest in damaged
    }
    for each in scrubbed.image.descriptors:
        assert Digest.of(scrubbed.workshop.blobs.path(each.digest).read_bytes()) == each.digest
    assert await scrubbed.findings() == {}


async def test_a_missing_blob_is_made_again(scrubbed: Scrubbed) -> None:
    scrubbed.file("root layer").unlink()
    digest = scrubbed.digest("root layer")
    assert await scrubbed.findings() == {digest: Finding(digest, Problem.MISSING, "hello", "")}
    assert Digest.of(scrubbed.file("root layer").read_bytes()) == digest


async def test_without_repair_everything_is_left_as_it_is(scrubbed: Scrubbed) -> None:
    flip(scrubbed.file("layer"))
    scrubbed.file("config").unlink()
    found = await scrubbed.findings(repair=False)
    assert {digest: (each.problem, each.error) for digest, each in found.items()} == {
        scrubbed.digest("layer"): (Problem.DAMAGED, "not repaired"),
        scrubbed.digest("config"): (Problem.MISSING, "not repaired"),
    }
    assert Digest.of(scrubbed.file("layer").read_bytes()) != scrubbed.digest("layer")
    assert not scrubbed.file("config").exists()
    assert all(each.error == "" for each in (await scrubbed.findings()).values())


async def test_a_damaged_blob_that_nobody_knows_is_removed_and_can_not_be_repaired(
    scrubbed: Scrubbed,
) -> None:
    orphan = (await scrubbed.workshop.blobs.put_bytes(b"an orphan", "text/plain")).digest
    flip(scrubbed.workshop.blobs.path(orphan))
    found = await scrubbed.findings()
    assert "no image is known that needs it" in found[orphan].error
    assert await scrubbed.workshop.blobs.stat(orphan) is None


async def test_a_damaged_blob_of_a_collected_image_is_removed_and_made_when_it_is_asked_for(
    scrubbed: Scrubbed,
) -> None:
    flip(scrubbed.file("root layer"))
    digest = scrubbed.digest("root layer")
    [hello] = [each for each in await scrubbed.workshop.index.least_recently_used() if each.name == "hello"]
    await scrubbed.workshop.index.forget_image(hello.key, float("inf"))
    assert await scrubbed.findings() == {digest: Finding(digest, Problem.DAMAGED, "", "")}
    assert not scrubbed.file("root layer").exists()
    assert await scrubbed.repaired.obtain(digest, NO_DEADLINE)


async def test_what_is_collected_during_a_scrub_is_not_made_again(
    scrubbed: Scrubbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await scrubbed.workshop.image("jq")
    inventory = scrubbed.workshop.blobs.inventory

    async def after_a_collection() -> Mapping[Digest, BlobInfo]:
        [jq] = [each for each in await scrubbed.workshop.index.least_recently_used() if each.name == "jq"]
        await scrubbed.workshop.index.forget_image(jq.key, float("inf"))
        await scrubbed.workshop.blobs.delete(image.config.digest)
        return await inventory()

    monkeypatch.setattr(scrubbed.workshop.blobs, "inventory", after_a_collection)
    assert await scrubbed.findings() == {}
    assert await scrubbed.workshop.blobs.stat(image.config.digest) is None


async def test_after_a_crash_the_blobs_in_doubt_are_checked_and_no_others(scrubbed: Scrubbed) -> None:
    flip(scrubbed.file("layer"))
    flip(scrubbed.file("config"))
    scrubbed.repaired.in_doubt.update({scrubbed.digest("layer"), scrubbed.digest("manifest")})
    await scrubbed.scrub.check_what_is_in_doubt()
    assert not scrubbed.repaired.in_doubt
    assert Digest.of(scrubbed.file("layer").read_bytes()) == scrubbed.digest("layer")
    assert Digest.of(scrubbed.file("config").read_bytes()) != scrubbed.digest("config")


async def test_in_doubt_is_what_was_written_since(scrubbed: Scrubbed) -> None:
    blobs, now = scrubbed.workshop.blobs, time.time()
    assert await written_since(blobs, now + 100) == set()
    assert scrubbed.digest("manifest") in await written_since(blobs, now - 1000)


async def test_a_check_takes_its_time() -> None:
    blobs = MemoryBlobStore()
    digest = (await blobs.put_bytes(bytes(100_000), "text/plain")).digest
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    assert await is_intact(blobs, digest, 1e6, sleep)
    assert sum(slept) == pytest.approx(0.1)


async def test_a_blob_that_can_not_be_read_to_its_end_is_not_intact(scrubbed: Scrubbed) -> None:
    digest = Digest.of(b"a folder in the place of a blob")
    scrubbed.workshop.blobs.path(digest).mkdir()
    assert not await is_intact(scrubbed.workshop.blobs, digest)
    scrubbed.workshop.blobs.path(digest).rmdir()
