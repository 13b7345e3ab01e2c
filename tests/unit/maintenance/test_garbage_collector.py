import asyncio
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import AsyncMock

import pytest

from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.builds.stores import Stores
from chandlery.image.name import ImageRequest
from chandlery.maintenance.garbage_collector import Collected, DiskLimits, GarbageCollector, use_interval
from chandlery.nix.nix import Nix, NixLimits
from chandlery.nix.pinned_source import PinnedSource
from chandlery.nix.stores import NixStores
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    BuiltImage,
    ManifestFormat,
    PackedLayer,
    Platform,
)
from chandlery.storage.file_store import FileBlobStore
from chandlery.storage.leases import Leases

HOUR = 3600.0
# Bytes of every blob here.
SIZE = 1000
MACHINES = Nix(None, NixLimits())


class FakeStores(NixStores):
    """Several stores that are there."""

    def __init__(self, *stores: Nix) -> None:
        super().__init__(Path(), NixLimits())
        self._there = stores

    def existing(self) -> Sequence[Nix]:
        return self._there


class FakeNix(Nix):
    """A store with paths of a size each, of which some are in use."""

    def __init__(self, folder: Path, sizes: dict[str, int], used: Collection[str] = ()) -> None:
        super().__init__(folder, NixLimits())
        self.left = sizes
        self.used = used
        self.asked: list[int] = []

    async def sizes(self) -> dict[str, int]:
        return dict(self.left)

    async def garbage(self) -> list[str]:
        return [path for path in self.left if path not in self.used]

    async def collect_garbage(self, at_most: int) -> None:
        self.asked.append(at_most)
        freed = 0
        for path in await self.garbage():
            if freed < at_most:
                freed += self.left.pop(path)


def recipe(name: str) -> Recipe:
    pin = PinnedSource("path", "/packages", "1" * 64)
    return Recipe(pin, ImageRequest((name,), Platform("linux", "amd64")), BuildOptions())


@dataclass
class Folder:
    """A data folder with images, each of which is some layers, and blobs that are nobody's."""

    blobs: FileBlobStore
    index: SqliteIndex
    leases: Leases
    path: Path

    async def image(self, name: str, *layers: str, used: float = 0.0) -> BuiltImage:
        """Make an image; it was used some seconds ago. Its manifests and its config are one blob."""
        descriptors = [await self.blobs.put_bytes(content(layer), OCI_LAYER) for layer in layers]
        packed = [PackedLayer(each, each.digest) for each in descriptors]
        manifest = await self.blobs.put_bytes(content(f"manifest of {name}"), OCI_MANIFEST)
        config = await self.blobs.put_bytes(content(f"config of {name}"), OCI_CONFIG)
        image = BuiltImage(dict.fromkeys(ManifestFormat, manifest), config, tuple(packed), 1, 1)
        for layer in packed:
            await self.index.remember_layer(layer.diff_id.hex, layer)
        CLOCK.now = time.time() - used
        await self.index.remember_image(recipe(name), image)
        return image

    async def orphan(self, name: str, *, age: float) -> Digest:
        digest = (await self.blobs.put_bytes(content(name), OCI_LAYER)).digest
        os.utime(self.blobs.path(digest), (time.time() - age,) * 2)
        return digest

    async def collect(self, limit: int, *nix: Nix, grace: float = HOUR, dry_run: bool = False) -> Collected:
        stores = Stores(self.path, FakeStores(*(nix or (MACHINES,))), self.blobs, self.index, self.leases)
        collector = GarbageCollector(stores, DiskLimits(limit, grace))
        return await collector.collect(dry_run=dry_run)

    async def has(self, *names: str) -> bool:
        """Return whether blobs are there, by their content; all of them are, or none."""
        [answer] = {await self.blobs.stat(digest(name)) is not None for name in names}
        return answer

    async def kept(self) -> list[str]:
        return [image.name for image in await self.index.least_recently_used()]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def content(name: str) -> bytes:
    return name.encode().ljust(SIZE)


def digest(name: str) -> Digest:
    return Digest.of(content(name))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    with (
        FileBlobStore(tmp_path) as blobs,
        SqliteIndex(tmp_path, CLOCK) as index,
        Leases(tmp_path) as leases,
    ):
        yield Folder(blobs, index, leases, tmp_path)


async def test_without_a_limit_and_below_it_nothing_goes(folder: Folder) -> None:
    await folder.image("old", "a", used=1000 * HOUR)
    await folder.orphan("orphan", age=1000 * HOUR)
    for limit in (0, 4 * SIZE):
        collected = await folder.collect(limit)
        assert (collected.size, collected.freed_blobs, collected.images) == (4 * SIZE, 0, [])
    assert await folder.has("a", "orphan")


async def test_the_least_recently_used_images_go_first_until_it_is_enough(folder: Folder) -> None:
    for hours, name in [(2, "c"), (4, "a"), (3, "b")]:
        await folder.image(name, f"layer {name}", used=hours * HOUR)
    collected = await folder.collect(8 * SIZE)
    assert [image.name for image in collected.images] == ["a"]
    assert collected.freed_blobs == 3 * SIZE
    assert collected.size == 6 * SIZE
    assert await folder.kept() == ["b", "c"]
    assert not await folder.has("layer a", "manifest of a", "config of a")
    assert await folder.has("layer b", "manifest of b", "layer c", "manifest of c")


async def test_what_an_image_needs_that_is_kept_is_never_removed(folder: Folder) -> None:
    await folder.image("old", "base", "only old", used=3 * HOUR)
    await folder.image("new", "base", "only new", used=0)
    await folder.collect(1)
    assert await folder.kept() == ["new"]
    assert await folder.has("base", "only new", "manifest of new")
    assert not await folder.has("only old", "manifest of old")


async def test_an_image_within_its_grace_time_stays_unless_far_too_much_is_taken(folder: Folder) -> None:
    for minutes, name in [(59, "a"), (30, "b"), (5, "c")]:
        await folder.image(name, f"layer {name}", used=minutes * 60)
    await folder.collect(5 * SIZE)
    assert await folder.kept() == ["a", "b", "c"]
    await folder.collect(4 * SIZE)  # 9 blobs are more than twice that
    assert await folder.kept() == ["c"]
    await folder.collect(1)
    assert await folder.kept() == ["c"]


async def test_blobs_that_no_image_needs_go_before_images_and_the_oldest_first(folder: Folder) -> None:
    await folder.image("old", "a", used=9 * HOUR)
    await folder.orphan("young orphan", age=2 * HOUR)
    await folder.orphan("old orphan", age=5 * HOUR)
    await folder.orphan("new orphan", age=60)
    collected = await folder.collect(5 * SIZE)
    assert (collected.orphans, collected.images) == (2, [])
    assert await folder.has("new orphan", "a")
    assert not await folder.has("young orphan", "old orphan")


async def test_layers_whose_blobs_went_are_forgotten(folder: Folder) -> None:
    await folder.image("old", "base", "only old", used=3 * HOUR)
    await folder.image("new", "base")
    await folder.collect(1)
    assert list(await folder.index.layers([digest("only old").hex, digest("base").hex])) == [
        digest("base").hex
    ]


async def test_what_was_collected_has_an_origin_still(folder: Folder) -> None:
    image = await folder.image("old", "a", used=3 * HOUR)
    await folder.collect(1)
    assert await folder.index.use_image(recipe("old").key) is None
    for each in image.descriptors:
        assert await folder.index.recipes(each.digest, 1) == [recipe("old")]


async def test_a_rehearsal_tells_what_would_go_and_removes_nothing(folder: Folder) -> None:
    await folder.image("old", "base", "only old", used=3 * HOUR)
    await folder.image("older", "base", "only older", used=4 * HOUR)
    await folder.image("new", "base", "only new")
    await folder.orphan("orphan", age=5 * HOUR)
    nix = FakeNix(
        folder.path, {"/nix/store/a": 500, "/nix/store/b": 500, "/nix/store/c": 500}, ["/nix/store/c"]
    )
    told = await folder.collect(SIZE, nix, dry_run=True)
    assert await folder.kept() == ["older", "old", "new"]
    assert await folder.has("orphan", "only old", "only older")
    assert len(nix.left) == 3
    done = await folder.collect(SIZE, nix)
    assert [image.name for image in told.images] == [image.name for image in done.images] == ["older", "old"]
    assert (told.freed_blobs, told.freed_nix, told.orphans) == (done.freed_blobs, done.freed_nix, 1)
    assert done.freed_blobs == 7 * SIZE


# Leases


async def test_a_leased_blob_stays_and_goes_when_nobody_needs_it_any_more(folder: Folder) -> None:
    await folder.image("old", "a", used=3 * HOUR)
    async with folder.leases.lease() as lease:
        await lease.take(digest("a"))
        await folder.collect(1)
        assert await folder.has("a")
        assert not await folder.has("manifest of old")
    os.utime(folder.blobs.path(digest("a")), (time.time() - 2 * HOUR,) * 2)
    await folder.collect(1)
    assert not await folder.has("a")


async def test_an_image_that_is_used_while_it_is_chosen_stays(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    await folder.image("old", "a", used=3 * HOUR)
    chosen = await folder.index.least_recently_used()
    CLOCK.now = time.time()
    assert await folder.index.remember_use(recipe("old").key)
    monkeypatch.setattr(folder.index, "least_recently_used", AsyncMock(return_value=chosen))
    await folder.collect(1)
    assert await folder.kept() == ["old"]
    assert await folder.has("a", "manifest of old")


async def test_an_image_that_comes_to_be_while_blobs_are_chosen_keeps_its_blobs(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    await folder.image("new", "a")
    for name in ("a", "manifest of new", "config of new"):
        os.utime(folder.blobs.path(digest(name)), (time.time() - 2 * HOUR,) * 2)
    as_before = AsyncMock(return_value=Counter())
    monkeypatch.setattr(folder.index, "references", as_before)
    await folder.collect(1)
    assert await folder.has("a", "manifest of new", "config of new")


async def test_a_build_that_reuses_a_layer_has_it_or_sees_that_it_is_gone(folder: Folder) -> None:
    """A hundred builds of images with a layer of an old one, while that is collected again and again."""
    stop = asyncio.Event()

    async def collecting() -> None:
        while not stop.is_set():
            await folder.collect(1, grace=0.001)
            await asyncio.sleep(0)

    async def build(number: int) -> str:
        name = f"image {number}"
        async with folder.leases.lease() as lease:
            wanted = [digest("shared"), digest(f"manifest of {name}"), digest(f"config of {name}")]
            await lease.take(*wanted)
            seen = "reused"
            if await folder.blobs.stat(digest("shared")) is None:
                seen = "packed again"
                await folder.blobs.put_bytes(content("shared"), OCI_LAYER)
            for _ in range(number % 7):
                await asyncio.sleep(0.001)
            await folder.image(name, "shared")
            assert all([await folder.blobs.stat(each) for each in wanted]), "a blob of a build was collected"
        return seen

    collector = asyncio.create_task(collecting())
    outcomes: list[str] = []
    for first in range(0, 100, 5):
        outcomes += await asyncio.gather(*(build(number) for number in range(first, first + 5)))
    stop.set()
    await collector
    assert set(outcomes) == {"reused", "packed again"}


async def test_a_crash_after_an_image_was_forgotten_leaves_blobs_that_go_next_time(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    await folder.image("old", "a", used=3 * HOUR)

    async def crash(_: Digest) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder.blobs, "delete", crash)
    with pytest.raises(KeyboardInterrupt):
        await folder.collect(1)
    monkeypatch.undo()
    assert await folder.kept() == []
    assert await folder.has("a", "manifest of old")
    for name in ("a", "manifest of old", "config of old"):
        os.utime(folder.blobs.path(digest(name)), (time.time() - 2 * HOUR,) * 2)
    collected = await folder.collect(1)
    assert collected.orphans == 3
    assert await folder.blobs.inventory() == {}


async def test_what_a_dead_process_left_is_removed_even_without_a_limit(folder: Folder) -> None:
    left = [folder.path / "tmp" / "1-dead", folder.path / "leases" / "1-dead" / "lease"]
    for each in left:
        each.mkdir(parents=True)
    await folder.collect(0)
    assert not any(each.exists() for each in left)


# Nix's store


async def test_nix_gives_first_what_is_more_than_a_quarter_of_the_limit(folder: Folder) -> None:
    await folder.image("old", "a", used=3 * HOUR)
    nix = FakeNix(folder.path, {f"/nix/store/{number}": 100 for number in range(50)})
    collected = await folder.collect(7000, nix)
    assert nix.asked == [1700]
    assert collected.freed_nix == 1700
    assert collected.images == []


async def test_then_images_go_and_then_the_rest_of_nix_that_is_not_in_use(folder: Folder) -> None:
    await folder.image("old", "a", used=3 * HOUR)
    await folder.image("new", "b")
    used = [f"/nix/store/{number}" for number in range(3)]
    nix = FakeNix(folder.path, {f"/nix/store/{number}": 100 for number in range(50)}, used)
    collected = await folder.collect(2000, nix)
    assert sorted(nix.left) == sorted(used)
    assert [image.name for image in collected.images] == ["old"]
    assert collected.size == 3 * SIZE + 300


async def test_the_largest_of_several_stores_gives_first(folder: Folder) -> None:
    small = FakeNix(folder.path, {f"/nix/store/{number}": 100 for number in range(10)})
    large = FakeNix(folder.path, {f"/nix/store/{number}": 100 for number in range(40)})
    told = await folder.collect(4000, small, large, dry_run=True)
    assert (len(small.left), len(large.left)) == (10, 40)
    collected = await folder.collect(4000, small, large)
    assert (large.asked, small.asked) == ([1400], [])
    assert collected.freed_nix == told.freed_nix == 1400


async def test_what_one_store_can_not_give_another_does(folder: Folder) -> None:
    used = [f"/nix/store/{number}" for number in range(39)]
    small = FakeNix(folder.path, {f"/nix/store/{number}": 100 for number in range(20)})
    large = FakeNix(folder.path, {f"/nix/store/{number}": 100 for number in range(40)}, used)
    told = await folder.collect(5000, small, large, dry_run=True)
    collected = await folder.collect(5000, small, large)
    assert collected.freed_nix == told.freed_nix == 1500
    assert (len(small.left), len(large.left)) == (6, 39)


async def test_the_machines_store_is_never_touched(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    await folder.image("old", "a")
    monkeypatch.setenv("PATH", "")  # no program of Nix could be run
    collected = await folder.collect(1)
    assert (collected.nix, collected.freed_nix) == (0, 0)


@pytest.mark.parametrize("grace", [0.1, 1.0, 60.0, HOUR, 1000 * HOUR])
def test_a_use_is_written_often_enough_even_for_the_short_grace_time(grace: float) -> None:
    assert 0 < use_interval(grace) <= 60.0
    # A reader may rely on what it read one interval ago, when it was written one interval before that.
    assert 2 * use_interval(grace) < grace / 10
