"""Build key -> what it made: a memory, never the truth.

Losing it costs time and nothing else, so nothing here is worth failing a pull for. A file that is no database
is moved aside, a record that can't be read is a miss, and what can't be written is logged and forgotten.
The other way round it must not lie: remember something only when every blob of it is durable.

One SQLite file, which several processes may use at once. Its name has the schema's version, so an older and a
newer Chandlery can share a data folder. Readers never wait for a writer (WAL); a write waits for the disk, so
the `remember_` methods belong in a thread. All methods can be called from any thread.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import structlog

from chandlery.data_folder import locked
from chandlery.errors import StorageError
from chandlery.oci import BuiltImage, PackedLayer

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

Record = TypeVar("Record", PackedLayer, BuiltImage)

# Counts up when the tables change, or the types whose JSON they hold.
SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS layers (key TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID, STRICT;
CREATE TABLE IF NOT EXISTS images (
    key TEXT PRIMARY KEY,
    record BLOB NOT NULL,
    created_at REAL NOT NULL,
    last_used REAL NOT NULL
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


class BuildIndex:
    """The index in `folder`; `clock` gives seconds since the epoch, for when an image was made and used.

    Raises `StorageError` when the folder can't be written.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        path = folder / f"build-index-{SCHEMA_VERSION}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # SQLite's own locks don't cover the change to WAL, nor moving a broken file aside.
            with locked(folder):
                self._writer = _open_or_start_anew(path)
            self._reader = _connect(path)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{path} can't be opened: {error}: choose another data folder") from error
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()

    def layer(self, key: str) -> PackedLayer | None:
        """Give the layer that was packed for this key."""
        return self._record("SELECT record FROM layers WHERE key = ?", key, PackedLayer)

    def remember_layer(self, key: str, layer: PackedLayer) -> None:
        """Remember a layer whose blob is durable."""
        with self._writing() as database:
            database.execute("REPLACE INTO layers VALUES (?, ?)", (key, msgspec.json.encode(layer)))

    def image(self, key: str) -> BuiltImage | None:
        """Give the image that was built for this key; its blobs may have been deleted since."""
        return self._record("SELECT record FROM images WHERE key = ?", key, BuiltImage)

    def remember_image(self, key: str, name: str, tag: str, image: BuiltImage) -> None:
        """Remember an image whose blobs are all durable, and that `name:tag` was it."""
        now = self._clock()
        with self._writing() as database:
            database.execute(
                "INSERT INTO images VALUES (?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET record = excluded.record, last_used = excluded.last_used",
                (key, msgspec.json.encode(image), now, now),
            )
            database.execute("REPLACE INTO tags VALUES (?, ?, ?)", (name, tag, key))

    def remember_use(self, key: str) -> None:
        """Remember that the image of this key is in use now."""
        with self._writing() as database:
            database.execute("UPDATE images SET last_used = ? WHERE key = ?", (self._clock(), key))

    def last_used(self) -> dict[str, float]:
        """Give the key of every image, and when it was last used, in seconds since the epoch."""
        return dict(self._read("SELECT key, last_used FROM images ORDER BY last_used, key", ()))

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

    def _read(self, query: str, parameters: tuple[str, ...]) -> list[Any]:
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
    # The locks of BuildIndex keep threads apart; transactions are begun by hand (isolation_level).
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
