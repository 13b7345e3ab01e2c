"""Build key -> what it made: a memory, never the truth.

Losing it costs time and nothing else, so nothing here is worth failing a pull for. A file that is no database
is moved aside, a record that can't be read is a miss, and what can't be written is logged and forgotten.
The other way round it must not lie: remember something only when every blob of it is durable.

An image is kept, or it was collected: then its blobs may be gone, and its recipe is remembered still, so that
it can be made again for whoever asks for one of its digests. What collectors ask decides what is deleted, so
those questions raise `StorageError` where others find nothing.

One SQLite file, which several processes may use at once. Its name has the schema's version, so an older and a
newer Chandlery can share a data folder. Readers never wait for a writer (WAL); a write waits for the disk, so
the `remember_` methods belong in a thread. All methods can be called from any thread.
"""

import asyncio
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import structlog

from chandlery.builds.index import RecordedBlob, RecordedImage
from chandlery.builds.recipe import Recipe
from chandlery.errors import StorageError, StorageFullError
from chandlery.machine.disk_errors import is_full
from chandlery.machine.locks import exclusive
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, PackedLayer

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

Record = TypeVar("Record", PackedLayer, BuiltImage, Recipe)

# Counts up when the tables change, or the types whose JSON they hold.
SCHEMA_VERSION = 3
_FILE = f"build-index-{SCHEMA_VERSION}.sqlite"

# Large columns come last: a query that reads the small ones of every image doesn't read those. `last_used`
# has no index: it changes with every use, and only collectors sort by it.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS layers (
    key TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    record BLOB NOT NULL
) WITHOUT ROWID, STRICT;
CREATE INDEX IF NOT EXISTS layers_by_digest ON layers (digest);
CREATE TABLE IF NOT EXISTS images (
    key TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    revision TEXT NOT NULL,
    created_at REAL NOT NULL,
    last_used REAL NOT NULL,
    kept INTEGER NOT NULL,
    origin BLOB NOT NULL,
    record BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS blobs (
    digest TEXT NOT NULL,
    key TEXT NOT NULL,
    size INTEGER NOT NULL,
    is_manifest INTEGER NOT NULL,
    PRIMARY KEY (digest, key)
) WITHOUT ROWID, STRICT;
CREATE INDEX IF NOT EXISTS blobs_by_image ON blobs (key);
CREATE TABLE IF NOT EXISTS image_indexes (
    digest TEXT PRIMARY KEY,
    created_at REAL NOT NULL,
    content BLOB NOT NULL
) WITHOUT ROWID, STRICT;
CREATE TABLE IF NOT EXISTS tags (
    name TEXT NOT NULL,
    tag TEXT NOT NULL,
    key TEXT NOT NULL,
    PRIMARY KEY (name, tag)
) WITHOUT ROWID, STRICT;
CREATE TABLE IF NOT EXISTS resolutions (
    pin TEXT NOT NULL,
    attribute_path TEXT NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (pin, attribute_path)
) WITHOUT ROWID, STRICT;
"""

# How long one process waits for another's write, in seconds.
_BUSY_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class IndexCounts:
    """How much an index knows: images that are kept, their blobs with their bytes, and layers packed once."""

    images: int = 0
    blobs: int = 0
    blob_bytes: int = 0
    layers: int = 0


def count(folder: Path) -> IndexCounts | None:
    """Count what the index in `folder` knows, without opening it for writing; None if it can't be read."""
    path = folder / _FILE
    if not path.exists():
        return IndexCounts()
    # Without its log nobody has it open, and reading it would make one.
    mode = "ro" if Path(f"{path}-wal").exists() else "ro&immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True)) as database:
            (images,) = database.execute("SELECT COUNT(*) FROM images WHERE kept").fetchone()
            blobs, size = database.execute(
                "SELECT COUNT(*), TOTAL(size) FROM (SELECT DISTINCT digest, size FROM blobs "
                "JOIN images USING (key) WHERE kept)"
            ).fetchone()
            (layers,) = database.execute("SELECT COUNT(DISTINCT digest) FROM layers").fetchone()
    except sqlite3.Error:
        return None
    return IndexCounts(images, blobs, int(size), layers)


class SqliteIndex:
    """See `builds.index`; the index of the data folder `folder`.

    `clock` gives seconds since the epoch. Raises `StorageError` when the folder can't be written.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.time, use_interval: float = 60.0
    ) -> None:
        self._tables = _Tables(folder, clock, use_interval)

    @property
    def use_interval(self) -> float:
        """See `BuildIndex`."""
        return self._tables.use_interval

    async def use_image(self, key: str) -> BuiltImage | None:
        """See `BuildIndex`."""
        tables = self._tables
        return await asyncio.to_thread(lambda: tables.image(key) if tables.remember_use(key) else None)

    async def layers(self, keys: Collection[str]) -> dict[str, PackedLayer]:
        """See `BuildIndex`."""
        found = await asyncio.to_thread(lambda: {key: self._tables.layer(key) for key in keys})
        return {key: layer for key, layer in found.items() if layer is not None}

    async def remember_image(self, recipe: Recipe, image: BuiltImage) -> None:
        """See `BuildIndex`."""
        await asyncio.to_thread(self._tables.remember_image, recipe, image)

    async def image_index(self, digest: Digest) -> bytes | None:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.image_index, digest)

    async def remember_image_index(self, content: bytes) -> None:
        """See `BuildIndex`."""
        await asyncio.to_thread(self._tables.remember_image_index, content)

    async def needs(self, name: str, digest: Digest) -> bool:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.needs, name, digest)

    async def tags(self, name: str) -> list[str]:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.tags, name)

    async def revisions(self, limit: int) -> list[str]:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.revisions, limit)

    async def remember_layer(self, key: str, layer: PackedLayer) -> None:
        """See `BuildIndex`."""
        await asyncio.to_thread(self._tables.remember_layer, key, layer)

    async def resolutions(self, pin: str, attribute_paths: Iterable[str]) -> dict[str, bytes]:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.resolutions, pin, attribute_paths)

    async def remember_resolutions(self, pin: str, records: Mapping[str, bytes]) -> None:
        """See `BuildIndex`."""
        await asyncio.to_thread(self._tables.remember_resolutions, pin, records)

    async def blob(self, digest: Digest) -> RecordedBlob | None:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.blob, digest)

    async def remember_use(self, key: str) -> bool:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.remember_use, key)

    async def recipes(self, digest: Digest, limit: int) -> list[Recipe]:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.recipes, digest, limit)

    async def least_recently_used(self, used_before: float = float("inf")) -> list[RecordedImage]:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.least_recently_used, used_before)

    async def blobs_of(self, key: str) -> dict[Digest, int]:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.blobs_of, key)

    async def references(self) -> Counter[Digest]:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.references)

    async def needed(self, digests: Iterable[Digest]) -> set[Digest]:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.needed, digests)

    async def forget_image(self, key: str, used_before: float) -> bool:
        """See `BuildIndex`."""
        return await asyncio.to_thread(self._tables.forget_image, key, used_before)

    async def forget_layers(self, digests: Iterable[Digest]) -> None:
        """See `BuildIndex`."""
        await asyncio.to_thread(self._tables.forget_layers, digests)

    async def forget_recipes(self, remembered: int) -> None:
        """See `BuildIndex`."""
        await asyncio.to_thread(self._tables.forget_recipes, remembered)

    def close(self) -> None:
        """Close the file; nothing may be called after it."""
        self._tables.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Tables:
    """The index in `folder`; `clock` gives seconds since the epoch, for when an image was made and used.

    The use of an image is written once in `use_interval` seconds. Raises `StorageError` when the folder can't
    be written.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.time, use_interval: float = 60.0
    ) -> None:
        self._clock = clock
        self.use_interval = use_interval
        self._path = path = folder / _FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # SQLite's own locks don't cover the change to WAL, nor moving a broken file aside.
            with exclusive(folder):
                self._writer = _open_or_start_anew(path)
            self._reader = _connect(path)
        except (OSError, sqlite3.Error) as error:
            # SQLite may call it an I/O error.
            if folder.is_dir() and is_full(folder):
                raise StorageFullError(str(folder)) from error
            raise StorageError(f"{path} can't be opened: {error}: choose another data folder") from error
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()

    def layer(self, key: str) -> PackedLayer | None:
        """Give the layer that was packed for this key."""
        return self._record("SELECT record FROM layers WHERE key = ?", key, PackedLayer)

    def remember_layer(self, key: str, layer: PackedLayer) -> None:
        """Remember a layer whose blob is durable."""
        row = (key, layer.descriptor.digest.hex, msgspec.json.encode(layer))
        with self._writing() as database:
            database.execute("REPLACE INTO layers VALUES (?, ?, ?)", row)

    def image(self, key: str) -> BuiltImage | None:
        """Give the image of this key, if it is kept; its blobs may have been lost since."""
        return self._record("SELECT record FROM images WHERE key = ? AND kept", key, BuiltImage)

    def remember_image(self, recipe: Recipe, image: BuiltImage) -> None:
        """Remember an image whose blobs are all durable, what it was made from, and its name and tag."""
        key, request, now = recipe.key, recipe.request, self._clock()
        row = (
            *(key, request.name, recipe.pin.revision, now, now, True),
            *(msgspec.json.encode(recipe), msgspec.json.encode(image)),
        )
        manifests = {each.digest for each in image.manifests.values()}
        blobs = [(each.digest.hex, key, each.size, each.digest in manifests) for each in image.descriptors]
        with self._writing() as database:
            database.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE "
                "SET origin = excluded.origin, record = excluded.record, last_used = excluded.last_used, "
                "kept = 1",
                row,
            )
            database.execute("DELETE FROM blobs WHERE key = ?", (key,))
            database.executemany("REPLACE INTO blobs VALUES (?, ?, ?, ?)", blobs)
            # The tag that was asked for, and the one that will always mean this revision.
            tags = ((request.name, tag, key) for tag in (request.reference, recipe.pin.tag))
            database.executemany("REPLACE INTO tags VALUES (?, ?, ?)", tags)

    def image_index(self, digest: Digest) -> bytes | None:
        """Give an OCI index that a tag once named; the images that it lists are made again if need be."""
        query = "SELECT content FROM image_indexes WHERE digest = ?"
        return next((content for (content,) in self._read(query, (digest.hex,))), None)

    def remember_image_index(self, content: bytes) -> None:
        """Remember an OCI index of images that are in this index."""
        digest = Digest.of(content)
        if self.image_index(digest) is None:
            with self._writing() as database:
                row = (digest.hex, self._clock(), content)
                database.execute("REPLACE INTO image_indexes VALUES (?, ?, ?)", row)

    def remember_use(self, key: str) -> bool:
        """Remember that the image of this key is in use now; False if it isn't kept.

        It is written only if the last use was written long enough ago.
        """
        now = self._clock()
        for (last_used,) in self._read("SELECT last_used FROM images WHERE key = ? AND kept", (key,)):
            if abs(now - last_used) < self.use_interval:
                return True
            with self._writing() as database:
                update = "UPDATE images SET last_used = ? WHERE key = ? AND kept"
                return database.execute(update, (now, key)).rowcount == 1
        return False

    def blob(self, digest: Digest) -> RecordedBlob | None:
        """Give what is known of a blob, from the image that was used last of those that need it.

        One that is kept comes before all that were collected.
        """
        rows = self._read(
            "SELECT key, size, is_manifest, kept FROM blobs JOIN images USING (key) WHERE digest = ? "
            "ORDER BY kept DESC, last_used DESC LIMIT 1",
            (digest.hex,),
        )
        return next(
            (RecordedBlob(key, size, bool(is_manifest), bool(kept)) for key, size, is_manifest, kept in rows),
            None,
        )

    def needs(self, name: str, digest: Digest) -> bool:
        """Tell whether an image of this name needs a blob; an OCI index is for all, its images aren't."""
        query = "SELECT 1 FROM blobs JOIN images USING (key) WHERE digest = ? AND name = ? LIMIT 1"
        return bool(self._read(query, (digest.hex, name))) or self.image_index(digest) is not None

    def recipes(self, digest: Digest, limit: int) -> list[Recipe]:
        """Give what images that need a blob were made from, at most `limit`, in the order of `blob`."""
        keys = self._read(
            "SELECT key FROM blobs JOIN images USING (key) WHERE digest = ? "
            "ORDER BY kept DESC, last_used DESC LIMIT ?",
            (digest.hex, limit),
        )
        query = "SELECT origin FROM images WHERE key = ?"
        recipes = (self._record(query, key, Recipe) for (key,) in keys)
        return [recipe for recipe in recipes if recipe is not None]

    def revisions(self, limit: int) -> list[str]:
        """Give the revisions of sources that images were made at, of the images used last first."""
        return [
            revision
            for (revision,) in self._read(
                "SELECT revision FROM images GROUP BY revision ORDER BY MAX(last_used) DESC LIMIT ?", (limit,)
            )
        ]

    def tags(self, name: str) -> list[str]:
        """Give the tags that a repository name was built with."""
        return [tag for (tag,) in self._read("SELECT tag FROM tags WHERE name = ? ORDER BY tag", (name,))]

    def resolutions(self, pin: str, attribute_paths: Iterable[str]) -> dict[str, bytes]:
        """Give what is known of these attribute paths at a pin; what isn't known is left out."""
        wanted = msgspec.json.encode(list(attribute_paths)).decode()
        return dict(
            self._read(
                "SELECT attribute_path, record FROM resolutions "
                "WHERE pin = ? AND attribute_path IN (SELECT value FROM json_each(?))",
                (pin, wanted),
            )
        )

    def remember_resolutions(self, pin: str, records: Mapping[str, bytes]) -> None:
        """Remember what attribute paths give at a pin, all of them or none."""
        rows = [(pin, attribute_path, record) for attribute_path, record in records.items()]
        with self._writing() as database:
            database.executemany("REPLACE INTO resolutions VALUES (?, ?, ?)", rows)

    def least_recently_used(self, used_before: float = float("inf")) -> list[RecordedImage]:
        """Give the images that are kept and were last used before a time, the oldest use first."""
        query = "SELECT key, name, last_used FROM images WHERE kept AND last_used < ? ORDER BY last_used, key"
        return [RecordedImage(*row) for row in self._ask(query, (used_before,))]

    def blobs_of(self, key: str) -> dict[Digest, int]:
        """Give the blobs that an image needs, with their sizes in bytes."""
        rows = self._ask("SELECT digest, size FROM blobs WHERE key = ? ORDER BY digest", (key,))
        return {Digest(digest): size for digest, size in rows}

    def references(self) -> Counter[Digest]:
        """Count for every blob how many of the images that are kept need it."""
        query = "SELECT digest, COUNT(*) FROM blobs JOIN images USING (key) WHERE kept GROUP BY digest"
        return Counter({Digest(digest): count for digest, count in self._ask(query)})

    def needed(self, digests: Iterable[Digest]) -> set[Digest]:
        """Give those of some blobs that an image needs that is kept."""
        wanted = msgspec.json.encode([digest.hex for digest in digests]).decode()
        rows = self._ask(
            "SELECT DISTINCT digest FROM blobs JOIN images USING (key) "
            "WHERE kept AND digest IN (SELECT value FROM json_each(?))",
            (wanted,),
        )
        return {Digest(digest) for (digest,) in rows}

    def forget_image(self, key: str, used_before: float) -> bool:
        """Keep an image no longer, unless it was used since a time; tell whether it was kept till now."""
        with self._writing() as database:
            update = "UPDATE images SET kept = 0 WHERE key = ? AND kept AND last_used < ?"
            return database.execute(update, (key, used_before)).rowcount == 1
        return False

    def forget_layers(self, digests: Iterable[Digest]) -> None:
        """Forget layers whose blobs were deleted."""
        with self._writing() as database:
            database.executemany("DELETE FROM layers WHERE digest = ?", [(each.hex,) for each in digests])

    def forget_recipes(self, remembered: int) -> None:
        """Forget images that were collected and OCI indexes, all but as many as `remembered`."""
        keys = self._ask(
            "SELECT key FROM images WHERE NOT kept ORDER BY last_used DESC LIMIT -1 OFFSET ?", (remembered,)
        )
        with self._writing() as database:
            for table in ("images", "blobs"):
                database.executemany(f"DELETE FROM {table} WHERE key = ?", keys)  # noqa: S608 (see above)
            database.execute(
                "DELETE FROM image_indexes WHERE digest IN "
                "(SELECT digest FROM image_indexes ORDER BY created_at DESC LIMIT -1 OFFSET ?)",
                (remembered,),
            )

    def close(self) -> None:
        """Close the file; nothing may be called after it."""
        with self._read_lock, self._write_lock:
            self._reader.close()
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, query: str, key: str, kind: type[Record]) -> Record | None:
        for (encoded,) in self._read(query, (key,)):
            try:
                record: Record = msgspec.json.decode(encoded, type=kind)
                return record
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                log.warning("a record of the build index can't be read", key=key, reason=str(error))
        return None

    def _ask(self, query: str, parameters: tuple[str | float, ...] = ()) -> list[Any]:
        """Run a query that may take a second, on a connection of its own, or say that it failed."""
        try:
            with closing(_connect(self._path)) as database:
                return database.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"{self._path} can't be read: {error}") from error

    def _read(self, query: str, parameters: tuple[str | int, ...]) -> list[Any]:
        try:
            with self._read_lock:
                return self._reader.execute(query, parameters).fetchall()
        except sqlite3.DatabaseError as error:
            _log_unless_our_fault(error)
            return []

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Run the body as one transaction, or not at all when it can't be written."""
        with self._write_lock:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                _log_unless_our_fault(error)
            finally:
                if self._writer.in_transaction:
                    with suppress(sqlite3.DatabaseError):
                        self._writer.execute("ROLLBACK")


def _connect(path: Path) -> sqlite3.Connection:
    # The locks of `_Tables` keep threads apart; transactions are begun by hand (isolation_level).
    return sqlite3.connect(path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)


def _open_or_start_anew(path: Path) -> sqlite3.Connection:
    try:
        return _open(path)
    except sqlite3.DatabaseError as error:
        if not _is_broken(error):
            raise
        _move_aside(path, str(error))
        return _open(path)


def _open(path: Path) -> sqlite3.Connection:
    """Open the database for writing, check it, and make its tables; `sqlite3.DatabaseError` if it is none."""
    database = _connect(path)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        for (finding,) in database.execute("PRAGMA quick_check(1)"):
            if finding != "ok":
                raise sqlite3.DatabaseError(finding)
        database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
    except BaseException:
        database.close()
        raise
    return database


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # none when quick_check found it
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _move_aside(path: Path, reason: str) -> None:
    """Keep a broken file for whoever wants to look into it; the one before it is overwritten."""
    aside = path.with_suffix(".broken")
    log.warning("the build index is broken: starting anew", file=str(path), kept=str(aside), reason=reason)
    path.replace(aside)
    for ending in ("-wal", "-shm"):
        Path(f"{path}{ending}").unlink(missing_ok=True)


def _log_unless_our_fault(error: sqlite3.DatabaseError) -> None:
    """Log what a disk or a file does; raise what only a mistake in this module can cause."""
    if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):
        raise error
    log.warning("the build index can't be used", reason=str(error))
