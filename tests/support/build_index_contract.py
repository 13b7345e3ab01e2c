"""What every build index keeps; an index's tests subclass this and give an `index` fixture."""

import pytest

from chandlery.builds.index import BuildIndex
from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.image.name import ImageRequest
from chandlery.image.profile import SHELL, SHIPPED
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_MANIFEST,
    BuiltImage,
    Descriptor,
    ManifestFormat,
    PackedLayer,
    Platform,
)


class Clock:
    """Seconds since the epoch, as a test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def digest_of(text: str) -> Digest:
    return Digest.of(text.encode())


def key_of(text: str) -> str:
    return digest_of(f"key {text}").hex


def a_layer(text: str) -> PackedLayer:
    """A layer with annotations, which images may have."""
    descriptor = Descriptor(f"{OCI_LAYER}+gzip", digest_of(text), len(text), {"of": text})
    return PackedLayer(descriptor, digest_of(f"tar of {text}"))


def an_image(text: str, *layers: str) -> BuiltImage:
    """An image with blobs of its own, and the layers of these names (two of its own if none)."""
    manifests = {
        each: Descriptor(OCI_MANIFEST, digest_of(f"{text} {each}"), len(text)) for each in ManifestFormat
    }
    config = Descriptor(OCI_CONFIG, digest_of(f"{text} config"), len(text))
    names = layers or (text, f"{text}2")
    return BuiltImage(manifests, config, tuple(map(a_layer, names)), 49, 123_456_789)


def a_recipe(*packages: str, reference: str = "latest", revision: str = "1" * 64, source: str = "") -> Recipe:
    pin = PinnedSource("debian", "bookworm", revision, nix={"lock": "/locks/1", "mirrors": ["a", "b"]})
    root_layer = RootLayerOptions(1000, 100, extra_commands="touch it")
    request = ImageRequest(packages, Platform("linux", "amd64"), source=source, reference=reference)
    return Recipe(pin, request, BuildOptions(50, "zstd", root_layer=root_layer))


GIT = a_recipe("git")


async def in_order_of_use(index: BuildIndex) -> list[tuple[str, float]]:
    return [(image.name, image.last_used) for image in await index.least_recently_used()]


class BuildIndexContract:
    """`index` uses `clock`, and records the use of an image once in 60 seconds."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def index(self, clock: Clock) -> BuildIndex:
        raise NotImplementedError

    async def test_a_layer_comes_back_equal(self, index: BuildIndex) -> None:
        await index.remember_layer(key_of("git"), a_layer("git"))
        keys = [key_of("git"), key_of("other")]
        assert await index.layers(keys) == {key_of("git"): a_layer("git")}
        assert await index.layers([]) == {}

    async def test_an_image_comes_back_equal(self, index: BuildIndex) -> None:
        await index.remember_image(GIT, an_image("git"))
        assert await index.use_image(GIT.key) == an_image("git")
        assert await index.use_image(key_of("other")) is None

    async def test_an_image_that_is_only_asked_for_is_not_used(self, index: BuildIndex, clock: Clock) -> None:
        await index.remember_image(GIT, an_image("git"))
        (before,) = await index.least_recently_used()
        clock.now += 1e6
        assert await index.image(GIT.key) == an_image("git")
        assert await index.least_recently_used() == [before]
        await index.forget_image(GIT.key, float("inf"))
        assert await index.image(GIT.key) is await index.image(key_of("other")) is None

    async def test_an_image_that_has_a_layer_twice_comes_back_equal(self, index: BuildIndex) -> None:
        image = an_image("git", "base", "git", "base")
        await index.remember_image(GIT, image)
        assert await index.use_image(GIT.key) == image
        assert await index.blobs_of(GIT.key) == {each.digest: each.size for each in image.descriptors}

    async def test_remembering_again_replaces(self, index: BuildIndex) -> None:
        for text in ("first", "second"):
            await index.remember_layer(key_of("git"), a_layer(text))
            await index.remember_image(GIT, an_image(text))
        assert await index.layers([key_of("git")]) == {key_of("git"): a_layer("second")}
        assert await index.use_image(GIT.key) == an_image("second")
        assert await index.blob(digest_of("first")) is None
        assert digest_of("first") not in await index.references()

    async def test_tags_are_those_of_the_name(self, index: BuildIndex) -> None:
        for name, tag in [("git", "unstable"), ("git", "latest"), ("git", "latest"), ("jq", "other")]:
            await index.remember_image(a_recipe(name, reference=tag), an_image(name))
        assert await index.tags("git") == ["1" * 16, "latest", "unstable"]
        assert await index.tags("none") == []

    async def test_each_revision_that_an_image_was_made_at_has_a_tag(self, index: BuildIndex) -> None:
        for revision in ("1" * 64, "2" * 64):
            await index.remember_image(a_recipe("git", revision=revision), an_image(revision))
        assert await index.tags("git") == ["1" * 16, "2" * 16, "latest"]

    async def test_an_image_has_all_the_names_that_it_was_remembered_by(self, index: BuildIndex) -> None:
        for source in ("", "stable"):
            recipe = a_recipe("git", source=source)
            assert recipe.key == GIT.key
            await index.remember_image(recipe, an_image("git"))
        for name in ("git", "stable/git"):
            assert await index.tags(name) == ["1" * 16, "latest"]
            assert await index.needs(name, digest_of("git"))

    async def test_the_tags_of_a_name_come_with_the_recipes_of_their_images(self, index: BuildIndex) -> None:
        first, second = a_recipe("git"), a_recipe("git", revision="2" * 64, reference="unstable")
        await index.remember_image(first, an_image("1", "shared", "of the first"))
        await index.remember_image(second, an_image("2", "shared"))
        await index.remember_image(a_recipe("jq"), an_image("3", "shared"))
        assert await index.tagged("git") == [("unstable", second), ("latest", first)]
        assert await index.tagged("git", digest_of("shared")) == [("unstable", second), ("latest", first)]
        assert await index.tagged("git", digest_of("of the first")) == [("latest", first)]
        for name, digest in (
            ("none", None),
            ("jq", digest_of("of the first")),
            ("git", digest_of("unknown")),
        ):
            assert await index.tagged(name, digest) == []

    async def test_an_image_that_is_known_may_get_another_tag_and_another_name(
        self, index: BuildIndex
    ) -> None:
        recipe = a_recipe("git")
        await index.remember_tag(recipe)
        assert await index.tagged("git") == []
        await index.remember_image(recipe, an_image("git"))
        for other in (a_recipe("git", reference="unstable"), a_recipe("git", source="stable")):
            for _ in range(2):
                await index.remember_tag(other)
        assert [tag for tag, _ in await index.tagged("git")] == ["latest", "unstable"]
        assert [(tag, each.key) for tag, each in await index.tagged("stable/git")] == [("latest", recipe.key)]
        assert await index.needs("stable/git", digest_of("git"))

    async def test_a_blob_is_needed_by_the_images_that_have_it(self, index: BuildIndex) -> None:
        await index.remember_image(a_recipe("git"), an_image("git", "shared", "of git"))
        await index.remember_image(a_recipe("jq"), an_image("jq", "shared", "of jq"))
        assert await index.needs("git", digest_of("of git"))
        assert await index.needs("git", digest_of("shared"))
        assert not await index.needs("git", digest_of("of jq"))
        assert not await index.needs("none", digest_of("shared"))
        assert not await index.needs("git", digest_of("unknown"))

    async def test_an_oci_index_is_for_images_of_all_names(self, index: BuildIndex) -> None:
        digest = Digest.of(b"{}")
        assert await index.image_index(digest) is None
        assert not await index.needs("none", digest)
        for _ in range(2):
            await index.remember_image_index(b"{}")
        assert await index.image_index(digest) == b"{}"
        assert await index.needs("none", digest)

    async def test_images_are_listed_in_the_order_of_their_last_use(
        self, index: BuildIndex, clock: Clock
    ) -> None:
        old, new = a_recipe("old"), a_recipe("new")
        await index.remember_image(old, an_image("old"))
        clock.now = 2000.0
        await index.remember_image(new, an_image("new"))
        assert await in_order_of_use(index) == [("old", 1000.0), ("new", 2000.0)]
        clock.now = 3000.0
        assert await index.remember_use(old.key)
        assert await in_order_of_use(index) == [("new", 2000.0), ("old", 3000.0)]
        clock.now = 4000.0
        assert await index.use_image(new.key) is not None
        assert await in_order_of_use(index) == [("old", 3000.0), ("new", 4000.0)]
        assert [image.name for image in await index.least_recently_used(3500.0)] == ["old"]
        clock.now = 5000.0
        await index.remember_image(old, an_image("old"))
        assert await in_order_of_use(index) == [("new", 4000.0), ("old", 5000.0)]

    async def test_what_is_used_within_the_interval_looks_used(self, index: BuildIndex, clock: Clock) -> None:
        assert index.use_interval == 60.0
        await index.remember_image(GIT, an_image("git"))
        clock.now = 1059.0
        assert await index.remember_use(GIT.key)
        assert await in_order_of_use(index) == [("git", 1000.0)]
        clock.now = 1060.0
        assert await index.remember_use(GIT.key)
        assert await in_order_of_use(index) == [("git", 1060.0)]

    async def test_the_use_of_an_image_that_is_not_kept_is_not_remembered(
        self, index: BuildIndex, clock: Clock
    ) -> None:
        assert not await index.remember_use(GIT.key)
        await index.remember_image(GIT, an_image("git"))
        clock.now += 100
        assert await index.forget_image(GIT.key, clock.now)
        assert not await index.remember_use(GIT.key)
        assert await index.use_image(GIT.key) is None

    async def test_a_recipe_comes_back_equal_and_has_all_that_nix_needs(self, index: BuildIndex) -> None:
        await index.remember_image(GIT, an_image("git"))
        for descriptor in an_image("git").descriptors:
            [recipe] = await index.recipes(descriptor.digest, limit=5)
            assert recipe == GIT
            assert recipe.key == GIT.key
            assert recipe.pin.to_nix() == GIT.pin.to_nix()

    async def test_a_recipe_comes_back_with_its_profile_and_what_nix_no_longer_has(
        self, index: BuildIndex
    ) -> None:
        pin = PinnedSource("git", "https://x/y", "3" * 40, nix=None, popularity="/table", stale="no network")
        request = ImageRequest(
            ("git",), Platform("linux", "arm64"), (SHELL,), profile=SHIPPED[SHELL], any_platform=True
        )
        recipe = Recipe(pin, request, BuildOptions(), "popular")
        await index.remember_image(recipe, an_image("git"))
        [found] = await index.recipes(digest_of("git"), limit=1)
        assert found == recipe
        assert (found.pin.nix, found.pin.popularity, found.pin.stale) == (None, "/table", "no network")

    async def test_a_blob_is_known_with_its_size_and_what_it_is(self, index: BuildIndex) -> None:
        await index.remember_image(GIT, an_image("git", "base"))
        base, manifest = await index.blob(digest_of("base")), await index.blob(digest_of("git oci"))
        assert base is not None
        assert (base.key, base.size, base.is_manifest, base.kept) == (GIT.key, 4, False, True)
        assert manifest is not None
        assert manifest.is_manifest
        assert await index.blob(digest_of("other")) is None

    async def test_of_images_that_share_a_blob_the_one_used_last_answers_and_one_that_is_kept_first(
        self, index: BuildIndex, clock: Clock
    ) -> None:
        for number, name in enumerate(["a", "b", "c"]):
            clock.now = 1000.0 + number
            await index.remember_image(a_recipe(name), an_image(name, "base"))
        base = digest_of("base")
        assert [each.request.name for each in await index.recipes(base, limit=2)] == ["c", "b"]
        for name in ("c", "b"):
            assert await index.forget_image(a_recipe(name).key, 2000.0)
        known = await index.blob(base)
        assert known is not None
        assert (known.key, known.kept) == (a_recipe("a").key, True)
        assert [each.request.name for each in await index.recipes(base, limit=5)] == ["a", "c", "b"]

    async def test_an_image_that_was_used_since_is_not_forgotten(self, index: BuildIndex) -> None:
        await index.remember_image(GIT, an_image("git"))
        assert not await index.forget_image(GIT.key, 1000.0)
        assert await index.use_image(GIT.key) is not None
        assert await index.forget_image(GIT.key, 1000.1)
        assert not await index.forget_image(GIT.key, 1000.1)
        assert not await index.forget_image(key_of("other"), 1000.1)

    async def test_an_image_that_was_forgotten_is_a_miss_with_a_recipe_and_can_be_remembered_again(
        self, index: BuildIndex
    ) -> None:
        await index.remember_image(GIT, an_image("git"))
        await index.forget_image(GIT.key, 2000.0)
        assert await index.use_image(GIT.key) is None
        assert await index.least_recently_used() == []
        assert await index.recipes(digest_of("git"), limit=1) == [GIT]
        assert await index.needs("git", digest_of("git"))
        await index.remember_image(GIT, an_image("git"))
        assert await index.use_image(GIT.key) == an_image("git")

    async def test_blobs_are_needed_as_long_as_one_image_that_needs_them_is_kept(
        self, index: BuildIndex
    ) -> None:
        for name in ("a", "b"):
            await index.remember_image(a_recipe(name), an_image(name, "base", name))
        base, only_a, unknown = digest_of("base"), digest_of("a"), digest_of("x")
        assert (await index.references())[base] == 2
        assert await index.needed([base, only_a, unknown]) == {base, only_a}
        await index.forget_image(a_recipe("a").key, 2000.0)
        assert (await index.references())[base] == 1
        assert await index.needed([base, only_a, unknown]) == {base}
        await index.forget_image(a_recipe("b").key, 2000.0)
        assert (await index.references())[base] == 0
        assert await index.needed([base, only_a, unknown]) == set()

    async def test_what_an_image_needs_is_told_when_it_was_collected(self, index: BuildIndex) -> None:
        assert await index.blobs_of(GIT.key) == {}
        await index.remember_image(GIT, an_image("git"))
        await index.forget_image(GIT.key, 2000.0)
        blobs = {each.digest: each.size for each in an_image("git").descriptors}
        assert await index.blobs_of(GIT.key) == blobs

    async def test_layers_are_forgotten_by_their_blobs(self, index: BuildIndex) -> None:
        for name in ("a", "b"):
            await index.remember_layer(key_of(name), a_layer(name))
        await index.remember_layer(key_of("a again"), a_layer("a"))
        await index.forget_layers([digest_of("a"), digest_of("x")])
        keys = [key_of(name) for name in ("a", "b", "a again")]
        assert await index.layers(keys) == {key_of("b"): a_layer("b")}

    async def test_an_image_stays_whole_when_its_layers_are_forgotten(self, index: BuildIndex) -> None:
        await index.remember_layer(key_of("git"), a_layer("git"))
        await index.remember_image(GIT, an_image("git"))
        await index.forget_layers([digest_of("git")])
        assert await index.use_image(GIT.key) == an_image("git")

    async def test_of_collected_images_those_used_last_are_remembered(
        self, index: BuildIndex, clock: Clock
    ) -> None:
        for number, name in enumerate(["a", "b", "c", "kept"]):
            clock.now = 1000.0 + number
            await index.remember_image(a_recipe(name), an_image(name))
            await index.remember_image_index(name.encode())
        for name in ("a", "b", "c"):
            await index.forget_image(a_recipe(name).key, 2000.0)
        await index.forget_recipes(remembered=2)
        assert await index.blob(digest_of("a")) is None
        assert await index.tags("a") == []
        assert await index.recipes(digest_of("a"), limit=1) == []
        for name in ("b", "c", "kept"):
            assert await index.blob(digest_of(name))
            assert await index.tags(name) == ["1" * 16, "latest"]
        indexes = [await index.image_index(Digest.of(name)) for name in (b"a", b"b", b"c", b"kept")]
        assert indexes == [None, None, b"c", b"kept"]

    async def test_revisions_are_those_of_images_the_last_used_first(
        self, index: BuildIndex, clock: Clock
    ) -> None:
        for number, (name, revision) in enumerate([("a", "1"), ("b", "2"), ("c", "1"), ("d", "3")]):
            clock.now = 1000.0 + number
            await index.remember_image(a_recipe(name, revision=revision), an_image(name))
        assert await index.revisions(10) == ["3", "1", "2"]
        assert await index.revisions(2) == ["3", "1"]

    async def test_resolutions_are_those_that_were_remembered_at_that_pin(self, index: BuildIndex) -> None:
        await index.remember_resolutions("pin", {"git": b"1", "jq": b"\0"})
        await index.remember_resolutions("pin", {"git": b"2"})
        assert await index.resolutions("pin", ["git", "jq", "other"]) == {"git": b"2", "jq": b"\0"}
        assert await index.resolutions("another pin", ["git"]) == {}

    async def test_there_may_be_any_number_of_resolutions(self, index: BuildIndex) -> None:
        records = {f"package-{number}": b"{}" for number in range(70_000)}
        await index.remember_resolutions("pin", records)
        assert await index.resolutions("pin", records) == records
