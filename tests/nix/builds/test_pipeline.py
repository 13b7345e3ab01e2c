import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from chandlery.builds.recipe import Recipe
from chandlery.maintenance.garbage_collector import DiskLimits, GarbageCollector
from chandlery.nix.nix import NixLimits
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, ManifestFormat
from chandlery.storage.blob_store import BlobInfo
from tests.support.workshop import Workshop, opened

# One event loop for all of them: the processes that pack belong to it, and take half a second to start.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def fresh(tmp_path: Path) -> AsyncIterator[Workshop]:
    async with opened(tmp_path) as workshop:
        yield workshop


async def test_what_an_image_needs_is_leased_until_the_index_has_it(
    fresh: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    leased: list[set[Digest]] = []
    remember = fresh.index.remember_image

    async def watched(recipe: Recipe, image: BuiltImage) -> None:
        leased.append(fresh.leases.leased())
        await remember(recipe, image)

    monkeypatch.setattr(fresh.index, "remember_image", watched)
    packed, reused = await fresh.image("hello"), await fresh.image("greeter")
    for image, while_built in zip([packed, reused], leased, strict=True):
        assert while_built == {each.digest for each in image.descriptors}
    assert fresh.leases.leased() == set()


async def test_what_a_build_has_seen_is_not_collected_before_it_ends(
    fresh: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that can go goes whenever a build has just seen a blob."""
    collector = GarbageCollector(fresh.stores, DiskLimits(1, 1e-6))
    stat = fresh.blobs.stat
    first = await fresh.image("hello")
    seen: list[Digest] = []

    async def watched(digest: Digest) -> BlobInfo | None:
        info = await stat(digest)
        seen.append(digest)
        await collector.collect()
        return info

    monkeypatch.setattr(fresh.blobs, "stat", watched)
    image = await fresh.image("greeter")
    monkeypatch.undo()
    shared = {each.descriptor.digest for each in first.layers} & {
        each.descriptor.digest for each in image.layers
    }
    assert shared <= set(seen)
    assert [each.name for each in await fresh.index.least_recently_used()] == ["greeter"]
    for each in image.descriptors:
        assert Digest.of(fresh.blobs.path(each.digest).read_bytes()) == each.digest
    assert not fresh.blobs.path(first.layers[-1].descriptor.digest).exists()


async def test_a_layer_that_has_another_size_is_packed_again(fresh: Workshop) -> None:
    image = await fresh.image("hello")
    [shared] = {each.descriptor.digest for each in image.layers} & {
        each.descriptor.digest for each in (await fresh.image("greeter")).layers
    } - {each.descriptor.digest for each in (await fresh.image("jq")).layers}
    fresh.blobs.path(shared).write_bytes(b"cut")
    assert "hello-1.0" in fresh.names(await fresh.image("hello", "jq"))
    assert Digest.of(fresh.blobs.path(shared).read_bytes()) == shared


async def test_an_image_that_is_another_when_it_is_made_again_is_logged_with_what_differs(
    fresh: Workshop,
) -> None:
    image = await fresh.image("hello")
    manifest = image.manifests[ManifestFormat.OCI]
    [recipe] = await fresh.index.recipes(manifest.digest, 1)
    other = replace(image.layers[-1], diff_id=Digest.of(b"other"))
    recorded = replace(
        image,
        manifests={**image.manifests, ManifestFormat.OCI: replace(manifest, digest=Digest.of(b"other"))},
        layers=(*image.layers[:-1], other),
    )
    await fresh.index.remember_image(recipe, recorded)
    with capture_logs() as logs:
        assert await fresh.image("hello") == image
    [event] = [each for each in logs if each["event"] == "the same recipe has given another image"]
    assert event["differ"] == [
        {
            "diff_id": [str(other.diff_id), str(image.layers[-1].diff_id)],
            "bytes": [image.layers[-1].descriptor.size] * 2,
        }
    ]
    fresh.blobs.path(manifest.digest).unlink()
    with capture_logs() as logs:
        assert await fresh.image("hello") == image
    assert "the same recipe has given another image" not in [each["event"] for each in logs]


async def test_chandlerys_own_collection_waits_until_a_build_has_begun(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=NixLimits(begun_after=4.0)) as workshop:
        build = workshop.building("hello", "waiting-a")
        await workshop.gates.reached("waiting-a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await workshop.nix.collect_garbage(1 << 40)
        await workshop.nix.collect_garbage(1 << 40)
        workshop.gates.open("waiting-a")
        assert {"hello-1.0", "waiting-a-1.0"} <= set(workshop.names(await build))


async def test_what_is_instantiated_is_kept_from_nix_until_it_is_built(
    fresh: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    realise = fresh.nix.realise

    async def after_a_collection(*arguments: object, **options: object) -> None:
        await fresh.nix.collect_all_garbage()
        await realise(*arguments, **options)  # type: ignore[arg-type]

    resolved: list[object] = []
    resolve = fresh.nix.resolve

    async def counted(*arguments: object) -> object:
        resolved.append(arguments)
        return await resolve(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fresh.nix, "realise", after_a_collection)
    monkeypatch.setattr(fresh.nix, "resolve", counted)
    assert "greeter-1.0" in fresh.names(await fresh.image("greeter"))
    assert len(resolved) == 1


async def test_what_nix_collects_between_resolving_and_building_is_resolved_again(
    fresh: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    instantiate = fresh.nix.instantiate
    times = iter(range(10))

    async def after_a_collection(*arguments: object) -> str:
        if next(times) < 3:
            await fresh.nix.collect_all_garbage()
        return await instantiate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fresh.nix, "instantiate", after_a_collection)
    image = await fresh.image("greeter")
    assert "greeter-1.0" in fresh.names(image)
    assert next(times) == 4
