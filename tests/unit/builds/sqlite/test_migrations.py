import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from chandlery.builds.recipe import Recipe
from chandlery.builds.sqlite.index import IndexCounts, SqliteIndex, count
from chandlery.builds.sqlite.migrations import READERS
from chandlery.builds.sqlite.schema import SCHEMA_VERSION, file_of
from chandlery.oci.digest import Digest
from tests.support.build_index_contract import a_layer, a_recipe, an_image, digest_of, key_of
from tests.support.older_build_index import ORIGIN, OldFile, carried_over, record_of


@pytest.fixture
def old(tmp_path: Path) -> OldFile:
    return OldFile(tmp_path)


async def test_everything_is_carried_over(old: OldFile, tmp_path: Path) -> None:
    recipe = msgspec.json.decode(ORIGIN, type=Recipe)
    image = an_image("git", "base", "git")
    old.add_image(recipe, image, 2000.0, origin=ORIGIN)
    old.execute("INSERT INTO tags VALUES ('nonroot/git', 'newest', ?)", recipe.key)
    old.execute("INSERT INTO tags VALUES ('other/git', ?, ?)", "7" * 16, recipe.key)
    old.add_image(a_recipe("jq"), an_image("jq", "base", "jq"), 1500.0)
    old.add_image(a_recipe("gone", revision="8"), an_image("gone", "base", "gone"), 3000.0, kept=False)
    layer = a_layer("base")
    old.execute(
        "INSERT INTO layers VALUES (?, ?, ?)",
        *(key_of("base"), layer.descriptor.digest.hex, msgspec.json.encode(layer)),
    )
    old.execute("INSERT INTO image_indexes VALUES (?, 1.0, ?)", Digest.of(b"{}").hex, b"{}")
    old.execute("INSERT INTO image_indexes VALUES (?, 2.0, ?)", Digest.of(b"[]").hex, b"[]")
    old.execute("INSERT INTO resolutions VALUES ('pin', 'git', X'00ff')")
    before = old.path.read_bytes()
    counts_before = count(tmp_path)

    event = carried_over(tmp_path)
    numbers = {"images": 3, "tags": 5, "layers": 1, "image_indexes": 2, "resolutions": 1}
    assert {name: event[name] for name in (*numbers, "unreadable")} == {**numbers, "unreadable": {}}
    assert count(tmp_path) == counts_before
    with SqliteIndex(tmp_path, lambda: 1999.0) as index:
        assert [(each.name, each.last_used) for each in await index.least_recently_used()] == [
            ("jq", 1500.0),
            ("nonroot/git", 2000.0),
        ]
        assert await index.use_image(recipe.key) == image
        assert await index.use_image(a_recipe("gone", revision="8").key) is None
        [found] = await index.recipes(digest_of("git"), 1)
        assert found == recipe
        assert found.pin.nix == {"lock": "/var/lib/chandlery/lock", "mirrors": ["a", "b"]}
        assert [each.request.name for each in await index.recipes(digest_of("base"), 5)] == [
            "nonroot/git",
            "jq",
            "gone",
        ]
        assert await index.tags("nonroot/git") == ["7" * 16, "newest", "stable"]
        assert await index.tags("other/git") == ["7" * 16]
        assert await index.tags("gone") == ["8", "latest"]
        assert await index.needs("gone", digest_of("base"))
        assert (await index.references())[digest_of("base")] == 2
        assert await index.revisions(2) == ["8", "7" * 64]
        assert await index.layers([key_of("base")]) == {key_of("base"): layer}
        assert await index.image_index(Digest.of(b"{}")) == b"{}"
        assert await index.resolutions("pin", ["git"]) == {"git": b"\x00\xff"}
        await index.forget_recipes(1)
        assert await index.image_index(Digest.of(b"{}")) is None
        assert await index.image_index(Digest.of(b"[]")) == b"[]"
    with closing(sqlite3.connect(file_of(tmp_path))) as database:
        times = database.execute("SELECT created_at, last_used FROM images ORDER BY created_at").fetchall()
    assert times == [(1400.0, 1500.0), (1900.0, 2000.0), (2900.0, 3000.0)]
    # For the version before, which may be gone back to.
    assert old.path.read_bytes() == before
    assert not list(tmp_path.glob("build-index-3.sqlite-*"))


async def test_it_is_carried_over_once(old: OldFile, tmp_path: Path) -> None:
    old.add_image(a_recipe("git"), an_image("git"))
    assert carried_over(tmp_path)["images"] == 1
    with SqliteIndex(tmp_path, lambda: 1e9) as index:
        assert await index.forget_image(a_recipe("git").key, float("inf"))
        await index.forget_recipes(0)
    old.add_image(a_recipe("jq"), an_image("jq"))
    assert carried_over(tmp_path) == {}
    with SqliteIndex(tmp_path) as index:
        assert await index.blob(digest_of("git")) is None
        assert await index.blob(digest_of("jq")) is None


async def test_it_is_not_carried_over_into_a_file_that_broke(old: OldFile, tmp_path: Path) -> None:
    # Images of the older file may have been collected since.
    old.add_image(a_recipe("git"), an_image("git"))
    file_of(tmp_path).write_bytes(b"not a database" * 1000)
    assert carried_over(tmp_path) == {}
    file_of(tmp_path).unlink()
    assert carried_over(tmp_path) == {}


async def test_rows_that_can_not_be_read_are_left_out_and_counted(old: OldFile, tmp_path: Path) -> None:
    image = an_image("git")
    old.add_image(a_recipe("git"), image)
    old.add_image(a_recipe("a"), an_image("a"), origin=b"{")
    old.add_image(a_recipe("b"), an_image("b"), record=b'{"manifests": "\xff"}')
    old.add_image(a_recipe("c"), an_image("c"), record=record_of(an_image("c")).replace(b"49", b"1e999"))
    no_digest = record_of(an_image("d")).replace(digest_of("d config").hex.encode(), b"sha")
    old.add_image(a_recipe("d"), an_image("d"), record=no_digest)
    old.execute("INSERT INTO layers VALUES ('no key', 'x', ?)", msgspec.json.encode(a_layer("git")))
    old.execute("INSERT INTO layers VALUES (?, 'x', X'00')", key_of("x"))
    event = carried_over(tmp_path)
    assert (event["images"], event["unreadable"]) == (1, {"images": 4, "layers": 2})
    with SqliteIndex(tmp_path, lambda: 1000.0) as index:
        assert await index.use_image(a_recipe("git").key) == image
        assert set(await index.references()) == {each.digest for each in image.descriptors}
        for name in "abcd":
            assert await index.blob(digest_of(name)) is None


@pytest.mark.parametrize("damage", ["not a database", "damaged pages", "other tables", "a folder"])
async def test_of_an_older_file_that_can_not_be_read_nothing_is_carried_over(
    old: OldFile, tmp_path: Path, damage: str
) -> None:
    for number in range(100):
        old.add_image(a_recipe(f"p{number}"), an_image(f"{number}"))
    if damage == "not a database":
        old.path.write_bytes(b"not a database" * 1000)
    elif damage == "damaged pages":
        content = bytearray(old.path.read_bytes())
        for page in range(len(content) // 8192 * 4096, len(content), 4096):
            content[page : page + 64] = b"\xff" * 64
        old.path.write_bytes(content)
    elif damage == "other tables":
        old.execute("DROP TABLE resolutions")
    else:
        old.path.unlink()
        old.path.mkdir()
    event = carried_over(tmp_path)
    assert event["event"] == "an older build index can't be read: starting empty"
    with SqliteIndex(tmp_path) as index:
        assert await index.least_recently_used() == []
        await index.remember_image(a_recipe("git"), an_image("git"))
        assert await index.use_image(a_recipe("git").key) == an_image("git")
    assert carried_over(tmp_path) == {}


async def test_what_the_older_server_has_only_in_its_log_is_carried_over(
    old: OldFile, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(old.path)) as server:
        server.execute("INSERT INTO resolutions VALUES ('pin', 'git', X'01')")
        server.commit()
        assert Path(f"{old.path}-wal").stat().st_size
        assert carried_over(tmp_path)["resolutions"] == 1
        # And it goes on.
        server.execute("INSERT INTO resolutions VALUES ('pin', 'jq', X'01')")
        server.commit()


def test_an_index_that_is_not_carried_over_yet_is_counted(old: OldFile, tmp_path: Path) -> None:
    image = an_image("git", "base")
    old.add_image(a_recipe("git"), image)
    old.add_image(a_recipe("jq"), an_image("jq"), kept=False)
    blobs = {each.digest: each.size for each in image.descriptors}
    counts = IndexCounts(1, len(blobs), sum(blobs.values()), 0)
    assert count(tmp_path) == counts
    assert sorted(path.name for path in tmp_path.iterdir()) == [old.path.name]
    carried_over(tmp_path)
    assert count(tmp_path) == counts


def test_every_older_version_that_can_be_read_is_older() -> None:
    assert all(version < SCHEMA_VERSION for version in READERS)
