"""Two indexes that have nothing in common but their contract answer alike, whatever happens to them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandlery.builds.index import BuildIndex
from chandlery.builds.recipe import Recipe
from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.oci.digest import Digest
from tests.support.build_index_contract import (
    BuildIndexContract,
    Clock,
    a_layer,
    a_recipe,
    an_image,
    digest_of,
    key_of,
)
from tests.support.memory_build_index import MemoryBuildIndex


class TestMemoryBuildIndex(BuildIndexContract):
    @pytest.fixture
    def index(self, clock: Clock) -> BuildIndex:
        return MemoryBuildIndex(clock)


NAMES = ("a", "b", "c")
LAYERS = ("base", "glibc", "other")
REVISIONS = ("1" * 40, "2" * 40)
CONTENTS = (b"1", b"2", b"3")

recipes = st.builds(
    lambda name, reference, revision, source: a_recipe(
        name, reference=reference, revision=revision, source=source
    ),
    st.sampled_from(NAMES),
    st.sampled_from(("latest", "stable")),
    st.sampled_from(REVISIONS),
    st.sampled_from(("", "elsewhere")),
)
images = st.builds(
    lambda text, layers: an_image(text, *layers),
    st.sampled_from(("x", "y", "z")),
    st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4),
)
Step = Callable[[BuildIndex, float], Awaitable[object]]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Draw a call of an index; it gets the time, and gives what is to be the same."""
    recipe, image, number = draw(recipes), draw(images), draw(st.integers(0, 3))
    layer, content = draw(st.sampled_from(LAYERS)), draw(st.sampled_from(CONTENTS))
    calls: dict[str, Step] = {
        "remember_image": lambda index, _: index.remember_image(recipe, image),
        "remember_tag": lambda index, _: index.remember_tag(recipe),
        "use_image": lambda index, _: index.use_image(recipe.key),
        "remember_use": lambda index, _: index.remember_use(recipe.key),
        "forget_image": lambda index, now: index.forget_image(recipe.key, now - 30 * number),
        "forget_recipes": lambda index, _: index.forget_recipes(number),
        "remember_layer": lambda index, _: index.remember_layer(key_of(str(number)), a_layer(layer)),
        "forget_layers": lambda index, _: index.forget_layers([digest_of(layer)]),
        "remember_image_index": lambda index, _: index.remember_image_index(content),
    }
    # Most have to happen often for the others to say anything.
    often = ["remember_image"] * 4 + ["forget_image"] * 3
    return calls[draw(st.sampled_from([*often, *calls]))]


async def all_answers(index: BuildIndex) -> list[object]:
    """Return what an index says of everything that the steps are about."""
    digests = [each.digest for text in "xyz" for each in an_image(text, *LAYERS).descriptors]
    digests += [Digest.of(content) for content in CONTENTS]
    keys = [a_recipe(name, revision=revision).key for name in NAMES for revision in REVISIONS]
    names = [*NAMES, *(f"elsewhere/{name}" for name in NAMES)]
    answers: list[object] = [
        await index.layers([key_of(str(number)) for number in range(4)]),
        await index.revisions(5),
        await index.least_recently_used(),
        {digest: count for digest, count in (await index.references()).items() if count},
        await index.needed(digests),
    ]
    for digest in digests:
        answers += [await index.blob(digest), await index.recipes(digest, 3), await index.image_index(digest)]
        answers.append([await index.needs(name, digest) for name in names])
        answers.append([await index.tagged(name, digest) for name in names])
    answers += [await index.blobs_of(key) for key in keys]
    answers += [[await index.tags(name), await index.tagged(name)] for name in names]
    return answers


@settings(max_examples=60, deadline=None)
@given(taken=st.lists(st.tuples(steps(), st.integers(1, 90)), max_size=25))
def test_sqlite_answers_as_memory_does_after_any_calls(taken: list[tuple[Step, int]]) -> None:
    async def take(folder: Path) -> None:
        clock = Clock()
        memory = MemoryBuildIndex(clock)
        with SqliteIndex(folder, clock) as sqlite:
            for step, seconds in taken:
                clock.now += seconds
                assert await step(sqlite, clock.now) == await step(memory, clock.now)
            assert await all_answers(sqlite) == await all_answers(memory)

    with TemporaryDirectory() as folder:
        asyncio.run(take(Path(folder)))


@given(recipe=recipes)
def test_of_a_recipe_the_key_says_neither_tag_nor_source(recipe: Recipe) -> None:
    # What the steps count on: an image may have several names and tags.
    assert recipe.key in {a_recipe(name, revision=each).key for name in NAMES for each in REVISIONS}
