import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from chandlery.builds.images import BuildCapacity
from chandlery.builds.limits import BuildLimits
from chandlery.builds.recipe import Recipe
from chandlery.builds.wanted_collection import WantedCollection
from chandlery.errors import BuildTooLargeError, LowDiskError
from chandlery.maintenance.garbage_collector import DiskLimits, GarbageCollector
from chandlery.nix.configuration import host_paths
from chandlery.nix.nix import Nix, NixLimits, NixOptions
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, ManifestFormat
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.kinds import parse
from chandlery.storage.blob_store import BlobInfo
from tests.support.debian_packages import PACKAGES, Deb, Member
from tests.support.debian_repository import SUITE, Fault, debian_repository
from tests.support.nix_cache import publish, served_folder
from tests.support.nix_package_set import SYSTEM, packages
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


# What is too large before it is fetched


MB = 1_000_000


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("max_closure_size", r"large would take 4\.\d MB, and an image may take 3\.0 MB"),
        ("max_build_size", r"large needs 4\.\d MB of binary caches, and a build may write 3\.0 MB"),
    ],
)
async def test_what_binary_caches_say_is_too_large_is_not_fetched(
    tmp_path: Path, setting: str, expected: str
) -> None:
    package_set = packages(
        tmp_path / "set",
        """
        cacert = build "cacert" "mkdir $out"; iana-etc = build "iana-etc" "mkdir $out";
        library = build "library" "head -c 2000000 /dev/urandom > $out";
        large = build "large" "echo ${library} > $out; head -c 2000000 /dev/urandom >> $out";
        """,
    )
    host = tuple(host_paths())
    builder = Nix(tmp_path / "builder", NixLimits(), NixOptions(substituters=(), host_paths=host))
    found = await builder.resolve(package_set, SYSTEM, ["large", "cacert", "iana-etc"])
    derivations = [each.derivation for each in found.values()]
    await builder.realise(derivations, tmp_path / "roots", tmp_path / "log", own=False)
    key = publish(tmp_path / "builder", [each.store_path for each in found.values()], tmp_path)
    source = parse(f"path!{tmp_path / 'set'}", tmp_path, DebianMirrors("", "", ""))
    (tmp_path / "data").mkdir()
    limits = {
        "max_closure_size": BuildLimits(closure_size=3 * MB, free_disk=0),
        "max_build_size": BuildLimits(build_size=3 * MB, free_disk=0),
    }
    with served_folder(tmp_path / "cache", withheld="/nar/") as (address, asked):
        options = NixOptions(substituters=(address,), trusted_public_keys=(key,), host_paths=host)
        async with opened(
            tmp_path / "data",
            capacity=BuildCapacity(build=limits[setting]),
            nix_options=options,
            source=source,
        ) as workshop:
            with pytest.raises(BuildTooLargeError, match=expected) as refused:
                await workshop.image("large")
            assert refused.value.setting == setting
            assert WantedCollection(tmp_path / "data").take()
    assert [path for path in asked if ".narinfo" in path]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (
            BuildLimits(closure_size=30 * MB, free_disk=0),
            r"office would take about 51\.2 MB, and an image may take 30\.0 MB on this server: .*max_closure",
        ),
        (
            BuildLimits(closure_size=1 << 60, free_disk=0),
            r"the image needs 76\S+ GB of what is free on the device .*min_free_disk",
        ),
    ],
)
async def test_what_a_debian_index_says_is_too_large_is_not_fetched(
    tmp_path: Path, limits: BuildLimits, expected: str
) -> None:
    package = "endless" if limits.closure_size > 1 << 50 else "office"
    with debian_repository(tmp_path) as repository:
        repository.publish(
            *PACKAGES,
            Deb("office", fields={"Installed-Size": "20000", "Depends": "fonts, libc6"}),
            Deb("fonts", fields={"Installed-Size": "30000", "Depends": "office"}),
            Deb("endless", fields={"Installed-Size": "100000000000"}),
        )
        source = parse(f"debian!{SUITE}", tmp_path / "data", repository.mirrors)
        (tmp_path / "data").mkdir()
        capacity = BuildCapacity(build=limits)
        async with opened(tmp_path / "data", capacity=capacity, source=source) as workshop:
            with pytest.raises((BuildTooLargeError, LowDiskError), match=expected):
                await workshop.image(package)
            assert not [path for path in repository.requests if path.endswith(".deb")]
            # What is allowed is still made.
            if package == "office":
                await workshop.image("bash")


async def test_what_a_debian_index_says_is_too_small_is_stopped(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 * MB)  # noqa: S311
    with debian_repository(tmp_path) as repository:
        parts = [
            Deb(f"part-{number}", fields={"Installed-Size": "1"}, files={"usr/share/part": Member(content)})
            for number in range(8)
        ]
        needed = ", ".join(part.name for part in parts)
        repository.publish(*PACKAGES, *parts, Deb("all", fields={"Depends": needed}))
        source = parse(f"debian!{SUITE}", tmp_path / "data", repository.mirrors)
        (tmp_path / "data").mkdir()
        capacity = BuildCapacity(build=BuildLimits(closure_size=10 * MB, build_size=1 << 40, free_disk=0))
        # Without an end, unless something stops it.
        with repository.misbehaving(Fault.HANG, "part-7_1_all.deb"):
            async with opened(tmp_path / "data", capacity=capacity, source=source) as workshop:
                with pytest.raises(BuildTooLargeError, match=r"all takes more than \d+\.\d MB.*10\.0 MB"):
                    await workshop.image("all")
