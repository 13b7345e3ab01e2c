"""What an older version of the build index remembered, carried over when a file of this version is made.

Each version of the schema has a file of its own, and the older file stays as it is: one can go back to the
older Chandlery. It is read once; what it remembers later isn't carried over.

To add version 5: count `SCHEMA_VERSION` up, and add a function here that reads version 4, with queries of its
own, and one that counts. A reader gives what any version knows, so 3 is carried over to 5 at once.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from chandlery.builds.recipe import Recipe
from chandlery.builds.sqlite import schema, tables
from chandlery.oci.documents import BuiltImage, PackedLayer

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RememberedImage:
    """An image, whether it is kept or was collected."""

    key: str
    recipe: Recipe
    image: BuiltImage
    times: tables.Times


@dataclass(frozen=True, slots=True)
class RememberedTag:
    """A tag that an image was asked for by."""

    name: str
    tag: str
    key: str


@dataclass(frozen=True, slots=True)
class RememberedLayer:
    """A layer that was packed."""

    key: str
    layer: PackedLayer


@dataclass(frozen=True, slots=True)
class RememberedImageIndex:
    """An OCI index; the time is in seconds since the epoch."""

    content: bytes
    created_at: float


@dataclass(frozen=True, slots=True)
class RememberedResolution:
    """What an attribute path gives at a pin."""

    pin: str
    attribute_path: str
    record: bytes


Remembered = RememberedImage | RememberedTag | RememberedLayer | RememberedImageIndex | RememberedResolution

# Each with the name of its kind; None is a row that isn't what was written.
Rows = Iterator[tuple[str, Remembered | None]]


def read_version_3(old: sqlite3.Connection) -> Rows:
    """Read the version that had a row of JSON per image, and a row per image and blob."""
    images = "SELECT key, origin, record, created_at, last_used, kept FROM images ORDER BY created_at, key"
    for key, origin, record, created_at, last_used, kept in old.execute(images):
        recipe, image = _decoded(origin, Recipe), _decoded(record, BuiltImage)
        times = tables.Times(created_at, last_used, bool(kept))
        yield "images", RememberedImage(key, recipe, image, times) if recipe and image else None
    # An image has the tag of its revision anyway.
    asked_for = (
        "SELECT tags.name, tag, key FROM tags JOIN images USING (key) "
        "WHERE tag != substr(revision, 1, 16) OR tags.name != images.name"
    )
    for row in old.execute(asked_for):
        yield "tags", RememberedTag(*row)
    for key, record in old.execute("SELECT key, record FROM layers ORDER BY key"):
        layer = _decoded(record, PackedLayer)
        yield "layers", RememberedLayer(key, layer) if layer else None
    for row in old.execute("SELECT content, created_at FROM image_indexes"):
        yield "image_indexes", RememberedImageIndex(*row)
    for row in old.execute("SELECT pin, attribute_path, record FROM resolutions"):
        yield "resolutions", RememberedResolution(*row)


def count_version_3(old: sqlite3.Connection) -> tuple[int, int, int, int]:
    """Return how many images are kept, how many blobs they need, with how many bytes, and how many layers."""
    (images,) = old.execute("SELECT COUNT(*) FROM images WHERE kept").fetchone()
    blobs, size = old.execute(
        "SELECT COUNT(*), TOTAL(size) FROM (SELECT DISTINCT digest, size FROM blobs "
        "JOIN images USING (key) WHERE kept)"
    ).fetchone()
    (layers,) = old.execute("SELECT COUNT(DISTINCT digest) FROM layers").fetchone()
    return images, blobs, int(size), layers


# By their version. What the newest knows that is there is carried over.
READERS: dict[int, Callable[[sqlite3.Connection], Rows]] = {3: read_version_3}
COUNTS: dict[int, Callable[[sqlite3.Connection], tuple[int, int, int, int]]] = {3: count_version_3}


def carry_over(folder: Path, database: sqlite3.Connection) -> None:
    """Write what the newest older index in a folder remembers to a new one, which is in a transaction.

    Rows that can't be read are left out; of a file that can't be read nothing is carried over. Raises
    `sqlite3.Error` when the new one can't be written.
    """
    for version in sorted(READERS, reverse=True):
        path = schema.file_of(folder, version)
        if path.exists():
            _carry_over(path, READERS[version], database)
            return


class _OldFileError(Exception):
    """The older file can't be read."""


def _carry_over(path: Path, read: Callable[[sqlite3.Connection], Rows], database: sqlite3.Connection) -> None:
    # Of very many images it takes a minute.
    log.info("carrying over what an older build index remembers", file=str(path))
    numbers: Counter[str] = Counter()
    unreadable: Counter[str] = Counter()
    database.execute("SAVEPOINT carried_over")
    try:
        for kind, remembered in _all_of(path, read):
            written = remembered is not None and _put_whole(database, remembered)
            (numbers if written else unreadable)[kind] += 1
    except _OldFileError as error:
        database.execute("ROLLBACK TO carried_over")
        log.warning("an older build index can't be read: starting empty", file=str(path), reason=str(error))
    else:
        log.info(
            "an older build index is carried over", file=str(path), unreadable=dict(unreadable), **numbers
        )
    database.execute("RELEASE carried_over")


def _all_of(path: Path, read: Callable[[sqlite3.Connection], Rows]) -> Rows:
    try:
        with closing(schema.connect_to_read(path)) as old:
            schema.check(old)
            # One transaction: another process may go on writing.
            old.execute("BEGIN")
            yield from read(old)
    except sqlite3.Error as error:
        raise _OldFileError(str(error)) from error


def _put_whole(database: sqlite3.Connection, remembered: Remembered) -> bool:
    """Write all of a row, or nothing if it can't be read; return whether it is written."""
    database.execute("SAVEPOINT row")
    written = True
    try:
        _put(database, remembered)
    except (ValueError, OverflowError):
        # A digest that isn't one, for example.
        database.execute("ROLLBACK TO row")
        written = False
    database.execute("RELEASE row")
    return written


def _put(database: sqlite3.Connection, remembered: Remembered) -> None:
    match remembered:
        case RememberedImage(key, recipe, image, times):
            tables.put_image(database, key, recipe, image, times)
        case RememberedTag(name, tag, key):
            tables.put_tag(database, name, tag, key)
        case RememberedLayer(key, layer):
            tables.put_layer(database, key, layer)
        case RememberedImageIndex(content, created_at):
            tables.put_image_index(database, content, created_at)
        case RememberedResolution(pin, attribute_path, record):
            tables.put_resolutions(database, pin, {attribute_path: record})


def _decoded(encoded: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(encoded, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
