import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from chandlery.builds.recipe import Recipe
from chandlery.builds.sqlite.index import IndexCounts, SqliteIndex, count
from chandlery.builds.sqlite.migrations import READERS
from chandlery.builds.sqlite.schema import SCHEMA_VERSION, file_of
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage
from tests.support.build_index_contract import a_layer, a_recipe, an_image, digest_of, key_of

# As the version before wrote them: the statements and the JSON stand here, so that they stay.
VERSION_3 = """
PRAGMA journal_mode = WAL;
CREATE TABLE layers (key TEXT PRIMARY KEY, digest TEXT NOT NULL, record BLOB NOT NULL) WITHOUT ROWID, STRICT;
CREATE INDEX layers_by_digest ON layers (digest);
CREATE TABLE images (
    key TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    revision TEXT NOT NULL,
    created_at REAL NOT NULL,
    last_used REAL NOT NULL,
    kept INTEGER NOT NULL,
    origin BLOB NOT NULL,
    record BLOB NOT NULL
) STRICT;
CREATE TABLE blobs (
    digest TEXT NOT NULL,
    key TEXT NOT NULL,
    size INTEGER NOT NULL,
    is_manifest INTEGER NOT NULL,
    PRIMARY KEY (digest, key)
) WITHOUT ROWID, STRICT;
CREATE INDEX blobs_by_image ON blobs (key);
CREATE TABLE image_indexes (
    digest TEXT PRIMARY KEY, created_at REAL NOT NULL, content BLOB NOT NULL
) WITHOUT ROWID, STRICT;
CREATE TABLE tags (
    name TEXT NOT NULL, tag TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (name, tag)
) WITHOUT ROWID, STRICT;
CREATE TABLE resolutions (
    pin TEXT NOT NULL, attribute_path TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (pin, attribute_path)
) WITHOUT ROWID, STRICT;
"""

# One origin as it stands in such a file, letter by letter.
ORIGIN = (
    b'{"pin":{"kind":"debian","location":"bookworm","revision":"' + b"7" * 64 + b'","variant":"",'
    b'"nix":{"lock":"/var/lib/chandlery/lock","mirrors":["a","b"]},"popularity":"","stale":""},'
    b'"request":{"packages":["git"],"platform":{"os":"linux","architecture":"amd64"},"profiles":["nonroot"],'
    b'"source":"","reference":"stable","profile":{"packages":[],"user":"nonroot","entrypoint":[],"command":[],'
    b'"environment":{"HOME":"/home/nonroot"},"working_directory":"/home/nonroot","exposed_ports":["80/tcp"],'
    b'"labels":{"a":"b"}},"any_platform":true},"options":{"max_layers":96,"compression":"gzip",'
    b'"strategy":"grouped","root_layer":{"uid":0,"gid":0,"contents":[],"extra_commands":""}},'
    b'"popularity":"table"}'
)


def record_of(image: BuiltImage) -> bytes:
    """Write an image as version 3 did."""

    def descriptor(each: Any) -> dict[str, object]:
        return {
            "media_type": each.media_type,
            "digest": {"hex": each.digest.hex},
            "size": each.size,
            "annotations": each.annotations,
        }

    return msgspec.json.encode(
        {
            "manifests": {str(name): descriptor(each) for name, each in image.manifests.items()},
            "config": descriptor(image.config),
            "layers": [
                {"descriptor": descriptor(each.descriptor), "diff_id": {"hex": each.diff_id.hex}}
                for each in image.layers
            ],
            "store_paths": image.store_paths,
            "closure_size": image.closure_size,
        }
    )


class OldFile:
    """A file of version 3, made with SQL."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "build-index-3.sqlite"
        with closing(sqlite3.connect(self.path)) as database:
            database.executescript(VERSION_3)

    def execute(self, statement: str, *parameters: object) -> None:
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute(statement, parameters)

    def add_image(
        self,
        recipe: Recipe,
        image: BuiltImage,
        last_used: float = 1000.0,
        *,
        kept: bool = True,
        origin: bytes | None = None,
        record: bytes | None = None,
    ) -> None:
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(recipe.key, recipe.request.name, recipe.pin.revision, last_used - 100, last_used, kept),
                    *(origin or msgspec.json.encode(recipe), record or record_of(image)),
                ),
            )
            manifests = {each.digest for each in image.manifests.values()}
            database.executemany(
                "REPLACE INTO blobs VALUES (?, ?, ?, ?)",
                [
                    (each.digest.hex, recipe.key, each.size, each.digest in manifests)
                    for each in image.descriptors
                ],
            )
            for tag in (recipe.request.reference, recipe.pin.tag):
                database.execute("REPLACE INTO tags VALUES (?, ?, ?)", (recipe.request.name, tag, recipe.key))


@pytest.fixture
def old(tmp_path: Path) -> OldFile:
    return OldFile(tmp_path)


def carried_over(folder: Path, clock: float = 1000.0) -> Mapping[str, Any]:
    """Open an index; give what the log says of what it took from an older one."""
    with capture_logs() as logs, SqliteIndex(folder, lambda: clock):
        pass
    [event] = [each for each in logs if each["event"].startswith("an older build index")] or [{}]
    return event


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


OPEN = """
import os
import sys
from pathlib import Path
from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.builds.sqlite.migrations import READERS, read_version_3

def read(old):
    for number, row in enumerate(read_version_3(old), start=1):
        yield row
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), 9)

READERS[3] = read
print("ready", flush=True)
sys.stdin.readline()
SqliteIndex(Path(sys.argv[1])).close()
"""


def opening(folder: Path, killed_at_row: int = 0) -> subprocess.Popen[str]:
    """Start a process that opens an index when it is told to; it may die when it has written so many rows."""
    arguments = [sys.executable, "-c", OPEN, str(folder), str(killed_at_row)]
    return subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


async def test_who_is_killed_in_the_middle_leaves_it_to_the_next(old: OldFile, tmp_path: Path) -> None:
    for number in range(20):
        old.add_image(a_recipe(f"p{number}"), an_image(f"{number}"))
    counts = count(tmp_path)
    for row in (1, 15):
        process = opening(tmp_path, row)
        process.communicate("go\n")
        assert process.returncode == -signal.SIGKILL
        assert file_of(tmp_path).exists()
        assert count(tmp_path) == counts
    assert carried_over(tmp_path)["images"] == 20


async def test_processes_that_start_at_once_carry_it_over_once(old: OldFile, tmp_path: Path) -> None:
    for number in range(50):
        old.add_image(a_recipe(f"p{number}"), an_image(f"{number}", "base"))
    processes = [opening(tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = await asyncio.gather(*(asyncio.to_thread(process.communicate, "go\n") for process in processes))
    assert [process.returncode for process in processes] == [0] * 4
    assert "".join(output for output, _ in outputs).count("is carried over") == 1
    with SqliteIndex(tmp_path) as index:
        assert (await index.references())[digest_of("base")] == 50


def test_every_older_version_that_can_be_read_is_older() -> None:
    assert all(version < SCHEMA_VERSION for version in READERS)
