"""The file of the build index: its tables, and how it is opened, checked, and begun anew when it is broken.

The name of the file has the schema's version, so an older and a newer Chandlery can share a data folder; what
an older version remembered is carried over when the file is made (`builds.sqlite.migrations`).

What images have in common is stored once and named by an integer. An image lists its blobs in order, in its
record (`builds.sqlite.records`). The other way round, `blob_images` says which images need a blob: image 1000
stands in the blob's row of chunk 3 (1000 // 256) as the byte 232 (1000 % 256), among others in any order. So
a layer that all images share costs about a byte per image.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

T = TypeVar("T")

# Counts up when the tables change, or the types whose JSON they hold: see `builds.sqlite.migrations`.
SCHEMA_VERSION = 4

# Keys and digests are the 32 bytes of a sha256. Large columns come last: a query that reads the small ones of
# every image doesn't read those.
_TABLES = (
    """CREATE TABLE media_types (
        id INTEGER PRIMARY KEY,
        media_type TEXT NOT NULL UNIQUE
    ) STRICT""",
    # A row never changes and no id is used twice, so what was read by its id stays true. `diff_id` is that of
    # a layer; `annotations` are JSON, and mostly there are none.
    """CREATE TABLE blobs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        digest BLOB NOT NULL UNIQUE,
        size INTEGER NOT NULL,
        media_type INTEGER NOT NULL,
        diff_id BLOB,
        annotations BLOB
    ) STRICT""",
    # `record` is the layer as JSON where `blobs` describes the same blob in another way: mostly it is empty.
    """CREATE TABLE layers (
        key BLOB PRIMARY KEY,
        blob INTEGER NOT NULL,
        record BLOB
    ) WITHOUT ROWID, STRICT""",
    "CREATE INDEX layers_by_blob ON layers (blob)",
    """CREATE TABLE names (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE
    ) STRICT""",
    # `digest` is that of `recipe`, which is JSON.
    """CREATE TABLE contexts (
        id INTEGER PRIMARY KEY,
        digest BLOB NOT NULL UNIQUE,
        revision TEXT NOT NULL,
        recipe BLOB NOT NULL
    ) STRICT""",
    """CREATE TABLE images (
        id INTEGER PRIMARY KEY,
        key BLOB NOT NULL UNIQUE,
        name INTEGER NOT NULL,
        context INTEGER NOT NULL,
        kept INTEGER NOT NULL,
        created_at REAL NOT NULL,
        last_used REAL NOT NULL,
        record BLOB NOT NULL
    ) STRICT""",
    "CREATE INDEX images_by_use ON images (kept, last_used)",
    "CREATE INDEX images_by_context ON images (context)",
    """CREATE TABLE blob_images (
        blob INTEGER NOT NULL,
        chunk INTEGER NOT NULL,
        images BLOB NOT NULL,
        PRIMARY KEY (blob, chunk)
    ) WITHOUT ROWID, STRICT""",
    # Every image has one at least, so these also say which images were made for a name.
    """CREATE TABLE tags (
        name INTEGER NOT NULL,
        tag TEXT NOT NULL,
        image INTEGER NOT NULL,
        PRIMARY KEY (name, tag, image)
    ) WITHOUT ROWID, STRICT""",
    """CREATE TABLE image_indexes (
        digest BLOB PRIMARY KEY,
        created_at REAL NOT NULL,
        content BLOB NOT NULL
    ) WITHOUT ROWID, STRICT""",
    """CREATE TABLE pins (
        id INTEGER PRIMARY KEY,
        pin TEXT NOT NULL UNIQUE
    ) STRICT""",
    """CREATE TABLE resolutions (
        pin INTEGER NOT NULL,
        attribute_path TEXT NOT NULL,
        record BLOB NOT NULL,
        PRIMARY KEY (pin, attribute_path)
    ) WITHOUT ROWID, STRICT""",
)

# How long one process waits for another's write, in seconds.
_BUSY_TIMEOUT = 10.0

# Memory for pages while a new file is filled, in KiB: rows go to places all over it.
_CACHE_TO_FILL = 64 << 10


def file_of(folder: Path, version: int = SCHEMA_VERSION) -> Path:
    """Return the path of the index in a data folder."""
    return folder / f"build-index-{version}.sqlite"


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection; whoever has it sees that one thread at a time uses it."""
    # Transactions are begun by hand (isolation_level).
    return sqlite3.connect(path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a connection that makes no file; others may have it open, but none may open it meanwhile."""
    # Without its log nobody has it open, and reading it would make one.
    mode = "ro" if Path(f"{path}-wal").exists() else "ro&immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)


def open_or_start_anew(path: Path, fill: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
    """Open the index for writing; a broken file is moved aside. `fill` is called in a new one's transaction.

    The folder is to be locked meanwhile: SQLite's own locks don't cover the change to WAL, nor the moving.
    Raises `sqlite3.Error`.
    """
    try:
        return _open(path, fill)
    except sqlite3.DatabaseError as error:
        if not is_broken(error):
            raise
        _move_aside(path, str(error))
        return _open(path, fill)


def is_made(database: sqlite3.Connection) -> bool:
    """Return whether a file of this version has its tables, and what was carried over into them."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return bool(version == SCHEMA_VERSION)


def was_moved_aside(path: Path) -> bool:
    """Return whether there was an index of this schema that was found to be broken."""
    return _aside(path).exists()


def is_broken(error: sqlite3.Error) -> bool:
    """Return whether an error says that a file isn't a database, or a damaged one."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # none when quick_check found it
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def check(database: sqlite3.Connection) -> None:
    """Raise `sqlite3.DatabaseError` if the file isn't a database, or a damaged one."""
    for (finding,) in database.execute("PRAGMA quick_check(1)"):
        if finding != "ok":
            raise sqlite3.DatabaseError(finding)


def _open(path: Path, fill: Callable[[sqlite3.Connection], None]) -> sqlite3.Connection:
    database = connect(path)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        check(database)
        if not is_made(database):
            # In one transaction: whoever is killed in it leaves an empty database, where this starts again.
            database.execute(f"PRAGMA cache_size = -{_CACHE_TO_FILL}")
            database.execute("BEGIN IMMEDIATE")
            for statement in _TABLES:
                database.execute(statement)
            fill(database)
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            database.execute("COMMIT")
            database.execute("PRAGMA cache_size = -2000")  # SQLite's own
    except BaseException:
        database.close()
        raise
    return database


def _aside(path: Path) -> Path:
    return path.with_suffix(".broken")


def _move_aside(path: Path, reason: str) -> None:
    """Keep a broken file for whoever wants to look into it; the one before it is overwritten."""
    aside = _aside(path)
    log.warning("the build index is broken: starting anew", file=str(path), kept=str(aside), reason=reason)
    path.replace(aside)
    for ending in ("-wal", "-shm"):
        Path(f"{path}{ending}").unlink(missing_ok=True)


def first(database: sqlite3.Connection, query: str, kind: type[T], *parameters: object) -> T | None:
    """Return the first column of the first row; `kind` is what the column holds."""
    row = database.execute(query, parameters).fetchone()
    if row is None:
        return None
    found: T = row[0]
    return found


def id_of_text(database: sqlite3.Connection, table: str, column: str, text: str) -> int:
    """Return the id of a text in a table of texts, written if need be."""
    known = first(database, f"SELECT id FROM {table} WHERE {column} = ?", int, text)  # noqa: S608 (our names)
    if known is not None:
        return known
    return id_of_new(database.execute(f"INSERT INTO {table} ({column}) VALUES (?)", (text,)))  # noqa: S608


def id_of_new(cursor: sqlite3.Cursor) -> int:
    """Return the id of the row that was just inserted."""
    assert cursor.lastrowid is not None  # noqa: S101 (it follows an INSERT)
    return cursor.lastrowid
