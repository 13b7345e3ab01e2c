"""What an image costs in the build index, in bytes and in time, by how many there are; the peer is version 3.

The images are made up: 30 to 94 layers, of which all but two are shared with other images, the popular ones
with nearly all; a root layer, a config and two manifests of their own. The file of version 3 is written
first, and opening the index carries it over, so both hold the same. With 50,000 images it takes 2.2 GB.
"""

import asyncio
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from chandlery.builds.recipe import BuildOptions, Recipe
from chandlery.builds.sqlite.index import SqliteIndex
from chandlery.image.name import ImageRequest
from chandlery.image.profile import SHELL, SHIPPED, Profile
from chandlery.nix.pinned_source import PinnedSource
from chandlery.oci.digest import Digest
from chandlery.oci.documents import (
    ARCHITECTURES,
    MANIFEST_MEDIA_TYPE,
    OCI_CONFIG,
    OCI_LAYER,
    BuiltImage,
    Descriptor,
    PackedLayer,
    Platform,
)

_NUMBERS = (1_000, 5_000)
_SHARED_LAYERS = 4_000
_IMAGES_OF_A_PIN = 500
_ROUNDS = 200

_VERSION_3 = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE layers (key TEXT PRIMARY KEY, digest TEXT NOT NULL, record BLOB NOT NULL) WITHOUT ROWID, STRICT;
CREATE INDEX layers_by_digest ON layers (digest);
CREATE TABLE images (
    key TEXT PRIMARY KEY, name TEXT NOT NULL, revision TEXT NOT NULL, created_at REAL NOT NULL,
    last_used REAL NOT NULL, kept INTEGER NOT NULL, origin BLOB NOT NULL, record BLOB NOT NULL
) STRICT;
CREATE TABLE blobs (
    digest TEXT NOT NULL, key TEXT NOT NULL, size INTEGER NOT NULL, is_manifest INTEGER NOT NULL,
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


def tables(numbers: Collection[int] = _NUMBERS) -> Iterator[Table]:
    """Measure with each number of images, in a folder of its own."""
    for number in numbers:
        with tempfile.TemporaryDirectory(prefix="chandlery-index-") as temporary:
            yield asyncio.run(_table(Path(temporary), number))


async def _table(folder: Path, number: int) -> Table:
    now = time.time()
    _write_version_3(folder / "build-index-3.sqlite", number, now)
    result = Table(f"the build index with {number:,} images", "version 3", "version 4", title_justify="left")
    began = time.perf_counter()
    with SqliteIndex(folder):
        result.add_row("carried over", "", f"{time.perf_counter() - began:.1f} s")
    sizes = [(folder / f"build-index-{version}.sqlite").stat().st_size / number for version in (3, 4)]
    result.add_row("bytes an image", *(f"{size:,.0f}" for size in sizes))
    with (
        SqliteIndex(folder, clock=lambda: now) as index,
        closing(sqlite3.connect(folder / "build-index-3.sqlite", check_same_thread=False)) as old,
    ):
        for title, before, after in _questions(index, old, number):
            result.add_row(title, await _median(before), await _median(after))
    return result


Question = Callable[[], Awaitable[object]]

# Of version 3, as it asked them.
_OLD_IMAGE = "SELECT record FROM images WHERE key = ? AND kept"
_OLD_USE = "SELECT last_used FROM images WHERE key = ? AND kept"
_OLD_LAYER = "SELECT record FROM layers WHERE key = ?"
_OLD_BLOB = (
    "SELECT key, size, is_manifest, kept FROM blobs JOIN images USING (key) WHERE digest = ? "
    "ORDER BY kept DESC, last_used DESC LIMIT 1"
)
_OLD_NEEDS = "SELECT 1 FROM blobs JOIN images USING (key) WHERE digest = ? AND name = ? LIMIT 1"
_OLD_REFERENCES = "SELECT digest, COUNT(*) FROM blobs JOIN images USING (key) WHERE kept GROUP BY digest"


def _questions(
    index: SqliteIndex, old: sqlite3.Connection, number: int
) -> Iterator[tuple[str, Question | None, Question]]:
    """Yield what is asked, of version 3 (not all of it), and of version 4."""
    chosen = random.Random(1)  # noqa: S311 (no secret)
    some = chosen.sample(range(number), 50)
    keys, own = [_recipe(each).key for each in some], [_own_layer(each).descriptor.digest for each in some]
    layer_keys = [_layer_key(_shared_layer(each)) for each in range(60)]
    popular, name = _shared_layer(0).descriptor.digest, _recipe(0).request.name
    new, old_new = iter(range(number, 2 * number)), iter(range(number, 2 * number))

    def asked(query: str, *parameters: str) -> Question:
        return lambda: asyncio.to_thread(lambda: old.execute(query, parameters).fetchall())

    def old_image(key: str) -> BuiltImage:
        old.execute(_OLD_USE, (key,)).fetchall()
        [(record,)] = old.execute(_OLD_IMAGE, (key,))
        return msgspec.json.decode(record, type=BuiltImage)

    def old_layers() -> list[PackedLayer]:
        rows = (row for key in layer_keys for row in old.execute(_OLD_LAYER, (key,)))
        return [msgspec.json.decode(record, type=PackedLayer) for (record,) in rows]

    def old_blob() -> object:
        return old.execute(_OLD_BLOB, (chosen.choice(own).hex,)).fetchall()

    def old_remember_image() -> None:
        with old:
            _put_in_version_3(old, next(old_new), time.time())

    def remember_image() -> Awaitable[None]:
        each = next(new)
        return index.remember_image(_recipe(each), _image(each))

    yield (
        "use_image",
        lambda: asyncio.to_thread(old_image, chosen.choice(keys)),
        lambda: index.use_image(chosen.choice(keys)),
    )
    yield "layers, of 60 keys", lambda: asyncio.to_thread(old_layers), lambda: index.layers(layer_keys)
    yield (
        "blob, of one image",
        lambda: asyncio.to_thread(old_blob),
        lambda: index.blob(chosen.choice(own)),
    )
    yield "blob, of all images", asked(_OLD_BLOB, popular.hex), lambda: index.blob(popular)
    yield "recipes, of all images", None, lambda: index.recipes(popular, 10)
    yield "needs, yes", asked(_OLD_NEEDS, popular.hex, name), lambda: index.needs(name, popular)
    yield "needs, no", asked(_OLD_NEEDS, popular.hex, "other"), lambda: index.needs("other", popular)
    yield "tags", None, lambda: index.tags(name)
    yield "revisions", None, lambda: index.revisions(10)
    yield "needed, of 50 blobs", None, lambda: index.needed(own)
    yield "references", asked(_OLD_REFERENCES), index.references
    yield "remember_image, on the disk", lambda: asyncio.to_thread(old_remember_image), remember_image


async def _median(question: Question | None) -> str:
    if question is None:
        return ""
    times: list[float] = []
    while len(times) < _ROUNDS and sum(times) < 2:
        began = time.perf_counter()
        await question()
        times.append(time.perf_counter() - began)
    return f"{statistics.median(times) * 1000:,.2f} ms"


def _write_version_3(path: Path, number: int, now: float) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(_VERSION_3)
        with database:
            for each in range(number):
                _put_in_version_3(database, each, now - number + each)
                # All but the root layer.
                layers = [
                    (_layer_key(layer), layer.descriptor.digest.hex, msgspec.json.encode(layer))
                    for layer in _image(each).layers[:-1]
                ]
                database.executemany("REPLACE INTO layers VALUES (?, ?, ?)", layers)
        database.execute("PRAGMA journal_mode = WAL")


def _put_in_version_3(database: sqlite3.Connection, number: int, used: float) -> None:
    recipe, image = _recipe(number), _image(number)
    key, name = recipe.key, recipe.request.name
    manifests = {descriptor.digest for descriptor in image.manifests.values()}
    records = (msgspec.json.encode(recipe), msgspec.json.encode(image))
    row = (key, name, recipe.pin.revision, used, used, *records)
    database.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, 1, ?, ?)", row)
    database.executemany(
        "REPLACE INTO blobs VALUES (?, ?, ?, ?)",
        [(blob.digest.hex, key, blob.size, blob.digest in manifests) for blob in image.descriptors],
    )
    tags = [(name, tag, key) for tag in (recipe.request.reference, recipe.pin.tag)]
    database.executemany("REPLACE INTO tags VALUES (?, ?, ?)", tags)


def _recipe(number: int) -> Recipe:
    pin_number = number // _IMAGES_OF_A_PIN
    pin = PinnedSource(
        "debian",
        "bookworm",
        Digest.of(b"pin %d" % pin_number).hex,
        nix={"lock": f"/var/lib/chandlery/debian/bookworm/{pin_number}", "system": "x86_64-linux"},
    )
    with_shell = number % 2 == 0
    request = ImageRequest(
        tuple(sorted({f"package-{number}", f"tool-{number % 97}"})),
        Platform("linux", ARCHITECTURES[number % 3 == 0]),
        (SHELL,) if with_shell else (),
        profile=SHIPPED[SHELL] if with_shell else Profile(),
    )
    return Recipe(pin, request, BuildOptions(), Digest.of(b"popularity").hex)


def _image(number: int) -> BuiltImage:
    chosen = random.Random(number)  # noqa: S311 (no secret)
    shared: set[int] = {0}
    wanted = chosen.randint(28, 92)
    while len(shared) < wanted:
        shared.add(int(_SHARED_LAYERS * chosen.random() ** 4))
    root = _layer(f"root {number}")
    layers = (*map(_shared_layer, sorted(shared)), _own_layer(number), root)
    manifests = {
        each: Descriptor(media_type, Digest.of(f"{number} {each}".encode()), 9_000 + number % 1_000)
        for each, media_type in MANIFEST_MEDIA_TYPE.items()
    }
    config = Descriptor(OCI_CONFIG, Digest.of(b"config %d" % number), 8_000 + number % 1_000)
    return BuiltImage(manifests, config, layers, 90 + number % 100, 200_000_000 + number)


def _shared_layer(number: int) -> PackedLayer:
    return _layer(f"shared {number}")


def _own_layer(number: int) -> PackedLayer:
    return _layer(f"own {number}")


def _layer(text: str) -> PackedLayer:
    digest = Digest.of(text.encode())
    size = int(digest.hex[:6], 16)
    return PackedLayer(Descriptor(f"{OCI_LAYER}+gzip", digest, size), Digest.of(digest.hex.encode()))


def _layer_key(layer: PackedLayer) -> str:
    return Digest.of_parts(["layer", layer.diff_id.hex]).hex


if __name__ == "__main__":
    for each in tables([int(number) for number in sys.argv[1:]] or _NUMBERS):
        Console(width=120).print(each)
