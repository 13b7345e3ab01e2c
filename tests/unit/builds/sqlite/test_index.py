import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.builds.sqlite import blobs as sqlite_blobs
from chandlery.builds.sqlite import index as sqlite_index
from chandlery.builds.sqlite import schema as sqlite_schema
from chandlery.builds.sqlite import tables as sqlite_tables
from chandlery.builds.sqlite.index import IndexCounts, SqliteIndex, count
from chandlery.builds.sqlite.schema import SCHEMA_VERSION
from chandlery.builds.sqlite.tables import Times
from chandlery.errors import StorageError, StorageFullError
from chandlery.image.name import ImageRequest
from chandlery.image.profile import SHELL, SHIPPED, Profile
from chandlery.layers.root_layer import RootLayerOptions
from chandlery.machine.locks import exclusive
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, Descriptor, ManifestFormat, PackedLayer, Platform
from tests.support.build_index_contract import (
    GIT,
    BuildIndexContract,
    Clock,
    a_layer,
    a_recipe,
    an_image,
    digest_of,
    key_of,
)

NAME = f"build-index-{SCHEMA_VERSION}.sqlite"
KEY, OTHER_KEY = key_of("git"), key_of("other")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(tmp_path: Path, clock: Clock) -> Iterator[SqliteIndex]:
    with SqliteIndex(tmp_path, clock, use_interval=60.0) as opened:
        yield opened


class TestSqliteIndex(BuildIndexContract):
    @pytest.fixture
    def index(self, tmp_path: Path, clock: Clock) -> Iterator[SqliteIndex]:
        with SqliteIndex(tmp_path, clock) as opened:
            yield opened


@pytest.fixture
def database() -> Iterator[sqlite3.Connection]:
    """Return the tables, in memory and in a transaction."""
    connection = sqlite_schema.open_or_start_anew(Path(":memory:"), lambda _: None)
    connection.execute("BEGIN")
    yield connection
    connection.close()


def put(database: sqlite3.Connection, recipe: Recipe, image: BuiltImage, last_used: float = 0.0) -> None:
    sqlite_tables.put_image(database, recipe.key, recipe, image, Times(last_used, last_used))


async def test_what_was_remembered_is_known_to_another_process(tmp_path: Path) -> None:
    with SqliteIndex(tmp_path) as index:
        await index.remember_layer(KEY, a_layer("git"))
        await index.remember_image(GIT, an_image("git"))
    with SqliteIndex(tmp_path) as index:
        assert await index.layers([KEY, OTHER_KEY]) == {KEY: a_layer("git")}
        assert await index.use_image(GIT.key) == an_image("git")


async def test_no_query_runs_on_the_thread_of_the_event_loop(index: SqliteIndex) -> None:
    threads: set[int] = set()
    for connection in (index._reader, index._writer, index._surveyor):
        connection._database.set_trace_callback(lambda _: threads.add(threading.get_ident()))
    await index.remember_image(GIT, an_image("git"))
    assert await index.use_image(GIT.key)
    assert await index.references()
    assert await index.forget_image(GIT.key, 5000.0)
    assert len(threads) == 3
    assert threading.get_ident() not in threads


async def test_a_use_is_written_once_a_minute(index: SqliteIndex, clock: Clock, tmp_path: Path) -> None:
    await index.remember_image(GIT, an_image("git"))
    with sqlite3.connect(tmp_path / NAME) as database:
        changes = "PRAGMA data_version"  # counts up with every commit of another connection
        for now, written in [
            (1030.0, False),
            (1059.0, False),
            (1061.0, True),
            (1062.0, False),
            (1200.0, True),
        ]:
            before = database.execute(changes).fetchone()
            clock.now = now
            assert await index.use_image(GIT.key)
            assert await index.remember_use(GIT.key)
            assert (database.execute(changes).fetchone() != before) == written


async def test_an_image_is_served_whose_use_can_not_be_written(index: SqliteIndex, clock: Clock) -> None:
    await index.remember_image(GIT, an_image("git"))
    clock.now += 100
    index._writer._database.execute("PRAGMA query_only = ON")
    assert await index.use_image(GIT.key) == an_image("git")


@contextmanager
def locked_by_another(folder: Path) -> Iterator[None]:
    """Hold the lock of a file for writing, as a backup or a stalled disk may."""
    with closing(sqlite3.connect(folder / NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def test_while_another_holds_the_lock_images_are_served_without_waiting_for_it(
    index: SqliteIndex, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await index.remember_image(GIT, an_image("git"))
    clock.now += 3600
    monkeypatch.setattr(sqlite_index, "_PATIENCE", 0.0)
    with locked_by_another(tmp_path):
        assert await index.use_image(GIT.key) == an_image("git")
        assert await index.remember_use(GIT.key)


async def test_what_is_made_while_another_holds_the_lock_is_kept_until_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_schema, "_BUSY_TIMEOUT", 0.01)
    with SqliteIndex(tmp_path) as index, SqliteIndex(tmp_path) as another:
        with locked_by_another(tmp_path):
            await index.remember_layer(KEY, a_layer("git"))
            await index.remember_image(GIT, an_image("git"))
            assert await index.use_image(GIT.key) == an_image("git")
            assert await another.use_image(GIT.key) is None
        await index.remember_image_index(b"{}")
        assert await another.use_image(GIT.key) == an_image("git")
        assert await another.layers([KEY]) == {KEY: a_layer("git")}
        assert await index.use_image(GIT.key) == an_image("git")


async def test_what_was_not_written_is_written_when_the_index_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_schema, "_BUSY_TIMEOUT", 0.01)
    with SqliteIndex(tmp_path) as index, locked_by_another(tmp_path):
        await index.remember_image(GIT, an_image("git"))
    with SqliteIndex(tmp_path) as index:
        assert await index.use_image(GIT.key) == an_image("git")


async def test_what_decides_about_deletion_is_never_guessed(index: SqliteIndex, tmp_path: Path) -> None:
    await index.remember_image(GIT, an_image("git"))
    with sqlite3.connect(tmp_path / NAME) as database:
        database.execute("UPDATE images SET record = X'00'")
    with pytest.raises(StorageError):
        await index.blobs_of(GIT.key)
    with sqlite3.connect(tmp_path / NAME) as database:
        database.execute("DROP TABLE blob_images")
    with pytest.raises(StorageError):
        await index.needed([digest_of("git")])
    with pytest.raises(StorageError):
        await index.references()


# --- what the tables hold

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
digests = st.sampled_from([digest_of(str(number)) for number in range(6)])
sizes = st.integers(0, 2**63 - 1)
descriptors = st.builds(Descriptor, texts, digests, sizes, st.dictionaries(texts, texts, max_size=2))
built_images = st.builds(
    BuiltImage,
    st.dictionaries(st.sampled_from(ManifestFormat), descriptors),
    descriptors,
    st.lists(st.builds(PackedLayer, descriptors, digests), max_size=5).map(tuple),
    sizes,
    sizes,
)
pins = st.builds(
    PinnedSource,
    texts,
    texts,
    texts,
    texts,
    st.none() | st.dictionaries(texts, st.lists(texts) | sizes, max_size=2),
    popularity=texts,
    stale=texts,
)
requests = st.builds(
    ImageRequest,
    st.lists(texts, max_size=3).map(tuple),
    st.builds(Platform, texts, texts),
    st.lists(texts, max_size=2).map(tuple),
    texts,
    texts,
    st.sampled_from([Profile(), *SHIPPED.values()]),
    st.booleans(),
)
any_recipes = st.builds(Recipe, pins, requests, st.builds(BuildOptions, st.integers(1, 99)), texts)


@given(made=st.lists(st.tuples(any_recipes, built_images), max_size=4))
def test_whatever_blobs_images_have_in_common_each_comes_back_equal(
    made: list[tuple[Recipe, BuiltImage]],
) -> None:
    database = sqlite_schema.open_or_start_anew(Path(":memory:"), lambda _: None)
    with database:
        for recipe, image in made:
            put(database, recipe, image)
            sqlite_tables.put_layer(database, recipe.key, PackedLayer(image.config, digest_of("0")))
        for recipe, image in {recipe.key: (recipe, image) for recipe, image in made}.values():
            found = sqlite_tables.image(database, recipe.key, {})
            assert found is not None
            assert found.image == image
            [known] = [
                each
                for each in sqlite_tables.recipes(database, image.config.digest, len(made))
                if each.key == recipe.key
            ]
            assert known == recipe
            for name in ("nix", "popularity", "stale"):
                assert getattr(known.pin, name) == getattr(recipe.pin, name)
            layer = PackedLayer(image.config, digest_of("0"))
            assert sqlite_tables.layers(database, [recipe.key]) == {recipe.key: layer}
    database.close()


def test_what_was_forgotten_leaves_nothing(database: sqlite3.Connection) -> None:
    tables = ("blobs", "blob_images", "layers", "images", "names", "tags", "contexts", "image_indexes")

    def rows() -> dict[str, int]:
        counts = ((each, database.execute(f"SELECT COUNT(*) FROM {each}")) for each in tables)  # noqa: S608
        return {each: count.fetchone()[0] for each, count in counts}

    for number in range(3):
        for text in ("git", "jq"):
            put(database, a_recipe(text, revision=str(number)), an_image(f"{text} {number}", "base", text))
            sqlite_tables.put_layer(database, key_of(text), a_layer(f"{text} {number}"))
    assert all(rows()[each] for each in tables[:-1])
    # Remade with other blobs, and with another name.
    put(database, a_recipe("git", revision="1", source="other"), an_image("other", "third"))
    assert sqlite_tables.blob(database, digest_of("git 1 config")) is None
    sqlite_tables.put_image_index(database, b"{}", 0.0)
    database.execute("UPDATE images SET kept = 0")
    # An unreadable record can be forgotten as well.
    database.execute("UPDATE images SET record = X'00' WHERE id = 3")
    assert sqlite_tables.drop_collected(database, 1, 2) == 2
    assert sqlite_tables.drop_collected(database, 0, 10) == 4
    sqlite_tables.drop_image_indexes(database, 0)
    sqlite_tables.drop_layers(database, [digest_of(f"{text} 2") for text in ("git", "jq")])
    assert rows() == dict.fromkeys(tables, 0)


def test_a_blob_that_most_images_need_is_answered_from_those_used_last(database: sqlite3.Connection) -> None:
    number = 2 * sqlite_blobs.CHUNK + 10
    for each in range(number):
        layers = ("base", "often") if each % 2 else ("base",)
        put(database, a_recipe(f"p{each:03}"), an_image(f"p{each:03}", *layers), last_used=each * 7 % number)
    for each in (1, 2, 3):
        assert sqlite_tables.forget_image(database, a_recipe(f"p{each:03}").key, float("inf"))
    for blob, images in (("base", range(number)), ("often", range(1, number, 2))):
        in_order = sorted(images, key=lambda each: (each in (1, 2, 3), -(each * 7 % number)))
        for limit in (1, 5, number):
            found = sqlite_tables.recipes(database, digest_of(blob), limit)
            assert [each.request.name for each in found] == [f"p{each:03}" for each in in_order[:limit]]
    # All that need it were used long ago: the first of all images aren't among them.
    database.execute("UPDATE images SET last_used = -1 WHERE id % 2 = 0")
    assert len(sqlite_tables.recipes(database, digest_of("often"), 5)) == 5
    assert sqlite_tables.needs(database, f"p{number - 1:03}", digest_of("often"))
    assert not sqlite_tables.needs(database, f"p{number - 2:03}", digest_of("often"))
    assert sqlite_tables.references(database)[digest_of("base")] == number - 3


def test_what_pulls_ask_goes_through_no_table(database: sqlite3.Connection) -> None:
    put(database, GIT, an_image("git", "base"))
    sqlite_tables.put_layer(database, KEY, a_layer("base"))
    statements: list[str] = []
    database.set_trace_callback(statements.append)
    assert sqlite_tables.image(database, GIT.key, {})
    assert sqlite_tables.last_used(database, GIT.key) is not None
    assert sqlite_tables.use_image(database, GIT.key, 1.0)
    assert sqlite_tables.layers(database, [KEY])
    assert sqlite_tables.blob(database, digest_of("base"))
    assert sqlite_tables.recipes(database, digest_of("base"), 5)
    assert sqlite_tables.needs(database, "git", digest_of("base"))
    assert sqlite_tables.image_index(database, Digest.of(b"{}")) is None
    assert sqlite_tables.resolutions(database, "pin", ["git"]) == {}
    assert sqlite_tables.tags(database, "git")
    put(database, a_recipe("jq"), an_image("jq", "base"))
    database.set_trace_callback(None)
    plans = [row[-1] for each in statements for row in database.execute(f"EXPLAIN QUERY PLAN {each}")]
    assert len(plans) > len(statements) > 20
    assert not [step for step in plans if step.startswith("SCAN") and "json_each" not in step]


def test_an_image_takes_less_than_2_kb(database: sqlite3.Connection) -> None:
    number, shared = 1000, [a_layer(f"shared {each}") for each in range(300)]
    for each in range(number):
        image = an_image(f"{each}", f"own {each}", f"root {each}")
        layers = (*shared[each % 240 : each % 240 + 60], *image.layers)
        profile = replace(
            a_recipe(f"p{each}").request, profiles=(SHELL,), profile=SHIPPED[SHELL], any_platform=True
        )
        plain = [replace(each, descriptor=replace(each.descriptor, annotations={})) for each in layers]
        put(database, replace(a_recipe(), request=profile), replace(image, layers=tuple(plain)))
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    (page_size,) = database.execute("PRAGMA page_size").fetchone()
    assert pages * page_size / number < 2048


# No NUL: an attribute path is an argument of a program.
@given(records=st.dictionaries(texts, st.binary()), others=st.sets(texts))
def test_resolutions_have_any_names_and_any_content(records: dict[str, bytes], others: set[str]) -> None:
    database = sqlite_schema.open_or_start_anew(Path(":memory:"), lambda _: None)
    sqlite_tables.put_resolutions(database, "pin", records)
    assert sqlite_tables.resolutions(database, "pin", [*records, *others]) == records
    assert sqlite_tables.resolutions(database, "another pin", records) == {}
    database.close()


# --- the file


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 1000])
async def test_a_file_that_is_no_database_is_moved_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with SqliteIndex(tmp_path) as index:
        await index.remember_layer(KEY, a_layer("git"))
        assert await index.layers([KEY]) == {KEY: a_layer("git")}
    if content:
        assert (tmp_path / NAME).with_suffix(".broken").read_bytes() == content


async def test_a_damaged_database_is_moved_aside(tmp_path: Path) -> None:
    with SqliteIndex(tmp_path) as index:
        records = {f"package-{number}": bytes(100) for number in range(1000)}
        await index.remember_resolutions("pin", records)
    damaged = bytearray((tmp_path / NAME).read_bytes())
    for page in range(2 * 4096, len(damaged), 4096):
        damaged[page : page + 64] = b"\xff" * 64
    (tmp_path / NAME).write_bytes(damaged)
    with SqliteIndex(tmp_path) as index:
        assert await index.resolutions("pin", ["package-7"]) == {}
        await index.remember_layer(KEY, a_layer("git"))
        assert await index.layers([KEY]) == {KEY: a_layer("git")}
    assert (tmp_path / NAME).with_suffix(".broken").exists()


async def test_another_schema_version_is_another_file(tmp_path: Path) -> None:
    with SqliteIndex(tmp_path):
        pass
    (tmp_path / NAME).rename(tmp_path / f"build-index-{SCHEMA_VERSION + 1}.sqlite")
    with SqliteIndex(tmp_path) as index:
        await index.remember_layer(KEY, a_layer("git"))
    assert len(list(tmp_path.glob("*.sqlite"))) == 2


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE images SET record = X'ff'",
        "UPDATE images SET record = X'97909000900000'",
        "UPDATE contexts SET recipe = X'7bff'",
        "DELETE FROM blobs",
        "UPDATE blobs SET diff_id = NULL",
        "UPDATE blobs SET annotations = X'ff'",
    ],
)
async def test_a_record_that_can_not_be_read_is_a_miss(tmp_path: Path, damage: str) -> None:
    with SqliteIndex(tmp_path) as index:
        await index.remember_layer(KEY, a_layer("git"))
        await index.remember_image(GIT, an_image("git"))
        with sqlite3.connect(tmp_path / NAME) as database:
            database.execute(damage)
        right: list[object] = [{KEY: a_layer("git")}, an_image("git"), [GIT]]
        found: list[object] = [
            await index.layers([KEY]),
            await index.use_image(GIT.key),
            await index.recipes(digest_of("git"), limit=1),
        ]
        assert found != right
        assert all(not each or each == wanted for each, wanted in zip(found, right, strict=True))
        await index.remember_image(GIT, an_image("new"))
        assert await index.use_image(GIT.key) == an_image("new")


async def test_what_can_not_be_written_fails_nobody(tmp_path: Path) -> None:
    with SqliteIndex(tmp_path) as index:
        await index.remember_layer(KEY, a_layer("git"))
        with sqlite3.connect(tmp_path / NAME) as database:
            database.execute("DROP TABLE layers")
        await index.remember_layer(OTHER_KEY, a_layer("jq"))
        assert await index.layers([KEY]) == {}
        await index.forget_layers([digest_of("git")])
        await index.remember_image(GIT, an_image("git"))
        assert await index.use_image(GIT.key) == an_image("git")


def test_a_folder_that_can_not_be_written_is_one_clear_line() -> None:
    with pytest.raises(StorageError, match=r"^/sys/chandlery/.*choose another data folder$"):
        SqliteIndex(Path("/sys/chandlery"))


async def test_a_reader_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    with SqliteIndex(tmp_path) as index:
        await index.remember_layer(KEY, a_layer("git"))
        other = sqlite3.connect(tmp_path / NAME, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        writing = asyncio.create_task(index.remember_layer(OTHER_KEY, a_layer("jq")))
        assert await index.layers([KEY]) == {KEY: a_layer("git")}
        assert await index.references() == {}
        assert not writing.done()
        other.execute("COMMIT")
        other.close()
        await writing
        assert await index.layers([OTHER_KEY]) == {OTHER_KEY: a_layer("jq")}


async def test_tasks_share_an_index(tmp_path: Path) -> None:
    with SqliteIndex(tmp_path) as index:
        layers = {key_of(f"{number}"): a_layer(f"{number}") for number in range(50)}
        await asyncio.gather(*(index.remember_layer(key, layer) for key, layer in layers.items()))
        assert await index.layers(layers) == layers


async def test_what_is_being_written_is_written_when_it_is_closed(tmp_path: Path) -> None:
    with SqliteIndex(tmp_path) as index:
        writing = asyncio.create_task(index.remember_layer(KEY, a_layer("git")))
        await asyncio.sleep(0)
    await writing
    with SqliteIndex(tmp_path) as index:
        assert await index.layers([KEY]) == {KEY: a_layer("git")}


def test_one_process_at_a_time_opens_an_index(tmp_path: Path) -> None:
    opener = threading.Thread(target=lambda: SqliteIndex(tmp_path).close())
    with exclusive(tmp_path):
        opener.start()
        opener.join(timeout=0.2)
        assert opener.is_alive()
    opener.join()
    assert (tmp_path / NAME).exists()


def test_that_it_can_not_be_opened_on_a_full_disk_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(StorageError, match="choose another data folder"):
        SqliteIndex(tmp_path)
    monkeypatch.setattr(sqlite_index, "is_full", lambda _: True)
    with pytest.raises(StorageFullError):
        SqliteIndex(tmp_path)


async def test_an_index_is_counted_whether_it_is_open_or_not(tmp_path: Path) -> None:
    assert count(tmp_path) == IndexCounts()
    with SqliteIndex(tmp_path) as index:
        for name in ("git", "jq", "gone"):
            await index.remember_image(a_recipe(name), an_image(name, "base", name))
            await index.remember_layer(key_of(name), a_layer(name))
        await index.forget_image(a_recipe("gone").key, float("inf"))
        images = [an_image(name, "base", name) for name in ("git", "jq")]
        blobs: dict[Digest, int] = {each.digest: each.size for image in images for each in image.descriptors}
        counts = IndexCounts(images=2, blobs=9, blob_bytes=sum(blobs.values()), layers=3)
        assert count(tmp_path) == counts
    assert count(tmp_path) == counts
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME]
    (tmp_path / NAME).write_bytes(b"not a database")
    assert count(tmp_path) is None


def test_options_are_part_of_what_comes_back(database: sqlite3.Connection) -> None:
    recipe = replace(GIT, options=BuildOptions(7, "none", root_layer=RootLayerOptions(1, 2)))
    put(database, recipe, an_image("git"))
    assert sqlite_tables.recipes(database, digest_of("git"), 1) == [recipe]
