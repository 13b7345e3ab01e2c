"""The build index as one SQLite file, which several processes of a machine may use at once.

Readers never wait for a writer (WAL), and a write waits for the disk; no query runs on the thread of the
event loop. There are three connections, each with a thread of its own: for pulls, for writing, and for
collectors, whose questions go through all images. The tables are those of `builds.sqlite.schema`, the
statements those of `builds.sqlite.tables`; `builds.sqlite.migrations` carries over what older versions knew.
"""

import asyncio
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import structlog
from cachetools import LRUCache

from chandlery.builds.index import MOST_TAGGED, RecordedBlob, RecordedImage
from chandlery.builds.recipe import Recipe
from chandlery.builds.sqlite import migrations, schema, tables
from chandlery.builds.sqlite.records import UnreadableRecordError
from chandlery.errors import StorageError, StorageFullError
from chandlery.machine.disk_errors import is_full
from chandlery.machine.locks import exclusive
from chandlery.oci.digest import Digest
from chandlery.oci.documents import BuiltImage, PackedLayer

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

T = TypeVar("T")

Work = Callable[[sqlite3.Connection], T]

# Images that are forgotten in one transaction: others have to write as well.
_BATCH = 256

# Seconds that a pull waits until its use is written; then it is written when it can be.
_PATIENCE = 1.0
# What could not be written and is kept in memory until it can be: images, layers and resolutions.
_MOST_UNWRITTEN = 1000


@dataclass(frozen=True, slots=True)
class IndexCounts:
    """How much an index knows: images that are kept, their blobs with their bytes, and layers packed once."""

    images: int = 0
    blobs: int = 0
    blob_bytes: int = 0
    layers: int = 0


def count(folder: Path) -> IndexCounts | None:
    """Return how much the index in `folder` knows, without opening it for writing; None if it can't be read.

    If there is none of this version yet, the newest of the older ones counts: it is still to be carried over.
    """
    counting = {schema.SCHEMA_VERSION: tables.count, **migrations.COUNTS}
    for version in sorted(counting, reverse=True):
        path = schema.file_of(folder, version)
        if path.exists():
            try:
                with closing(schema.connect_to_read(path)) as database:
                    if version != schema.SCHEMA_VERSION or schema.is_made(database):
                        return IndexCounts(*counting[version](database))
            except sqlite3.Error:
                return None
    return IndexCounts()


class SqliteIndex:
    """See `BuildIndex`; the index of the data folder `folder`, open until it is closed.

    `clock` gives seconds since the epoch. A record that can't be read is a miss, and what can't be written is
    logged. Raises `StorageError` when the folder can't be written.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.time, use_interval: float = 60.0
    ) -> None:
        self._clock = clock
        self._use_interval = use_interval
        self._known_layers: dict[int, PackedLayer] = {}  # of the thread that reads
        self._unwritten: deque[Work[None]] = deque(maxlen=_MOST_UNWRITTEN)  # of the thread that writes
        self._unwritten_images: LRUCache[str, BuiltImage] = LRUCache(_MOST_UNWRITTEN)
        self._path = path = schema.file_of(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive(folder):
                self._writer = _Thread(schema.open_or_start_anew(path, self._fill), "index-writer")
            self._reader = _Thread(schema.connect(path), "index-reader")
            self._surveyor = _Thread(schema.connect(path), "index-surveyor")
        except (OSError, sqlite3.Error) as error:
            # SQLite may call it an I/O error.
            if folder.is_dir() and is_full(folder):
                raise StorageFullError(str(folder)) from error
            raise StorageError(f"{path} can't be opened: {error}: choose another data folder") from error

    @property
    def use_interval(self) -> float:
        """See `BuildIndex`."""
        return self._use_interval

    async def use_image(self, key: str) -> BuiltImage | None:
        """See `BuildIndex`; the use is written only if the last was written long enough ago."""
        found = await self._found(key)
        if found is None:
            return self._unwritten_images.get(key)
        if not await self._used(key, found.last_used):
            return None
        return found.image

    async def image(self, key: str) -> BuiltImage | None:
        """See `BuildIndex`."""
        found = await self._found(key)
        return self._unwritten_images.get(key) if found is None else found.image

    async def remember_image(self, recipe: Recipe, image: BuiltImage) -> None:
        """See `BuildIndex`."""
        times = tables.Times(now := self._clock(), now)
        key = recipe.key
        if not await self._remember(lambda database: tables.put_image(database, key, recipe, image, times)):
            self._unwritten_images[key] = image

    async def image_index(self, digest: Digest) -> bytes | None:
        """See `BuildIndex`."""
        return await self._look(lambda database: tables.image_index(database, digest), None)

    async def remember_image_index(self, content: bytes) -> None:
        """See `BuildIndex`."""
        if await self.image_index(Digest.of(content)) is None:
            now = self._clock()
            await self._write(lambda database: tables.put_image_index(database, content, now), None)

    async def needs(self, name: str, digest: Digest) -> bool:
        """See `BuildIndex`."""
        return await self._look(
            lambda database: (
                tables.needs(database, name, digest) or tables.image_index(database, digest) is not None
            ),
            False,
        )

    async def tags(self, name: str) -> list[str]:
        """See `BuildIndex`."""
        return await self._look(lambda database: tables.tags(database, name), [])

    async def remember_tag(self, recipe: Recipe) -> None:
        """See `BuildIndex`."""
        tag = (recipe.request.name, recipe.request.reference, recipe.key)
        if not await self._look(lambda database: tables.has_tag(database, *tag), False):
            await self._remember(lambda database: tables.put_tag(database, *tag))

    async def tagged(self, name: str, digest: Digest | None = None) -> list[tuple[str, Recipe]]:
        """See `BuildIndex`."""
        return await self._look(lambda database: tables.tagged(database, name, digest, MOST_TAGGED), [])

    async def revisions(self, limit: int) -> list[str]:
        """See `BuildIndex`."""
        # It goes through all images, and nobody waits for it.
        return await self._look(lambda database: tables.revisions(database, limit), [], self._surveyor)

    async def layers(self, keys: Collection[str]) -> dict[str, PackedLayer]:
        """See `BuildIndex`."""
        return await self._look(lambda database: tables.layers(database, keys), {})

    async def remember_layer(self, key: str, layer: PackedLayer) -> None:
        """See `BuildIndex`."""
        await self._remember(lambda database: tables.put_layer(database, key, layer))

    async def resolutions(self, pin: str, attribute_paths: Iterable[str]) -> dict[str, bytes]:
        """See `BuildIndex`."""
        paths = list(attribute_paths)
        return await self._look(lambda database: tables.resolutions(database, pin, paths), {})

    async def remember_resolutions(self, pin: str, records: Mapping[str, bytes]) -> None:
        """See `BuildIndex`."""
        await self._remember(lambda database: tables.put_resolutions(database, pin, records))

    async def blob(self, digest: Digest) -> RecordedBlob | None:
        """See `BuildIndex`."""
        return await self._look(lambda database: tables.blob(database, digest), None)

    async def remember_use(self, key: str) -> bool:
        """See `BuildIndex`; it is written only if the last use was written long enough ago."""
        last_used = await self._look(lambda database: tables.last_used(database, key), None)
        return last_used is not None and await self._used(key, last_used)

    async def recipes(self, digest: Digest, limit: int) -> list[Recipe]:
        """See `BuildIndex`."""
        return await self._look(lambda database: tables.recipes(database, digest, limit), [])

    async def least_recently_used(self, used_before: float = float("inf")) -> list[RecordedImage]:
        """See `BuildIndex`."""
        return await self._survey(lambda database: tables.least_recently_used(database, used_before))

    async def blobs_of(self, key: str) -> dict[Digest, int]:
        """See `BuildIndex`."""
        return await self._survey(lambda database: tables.blobs_of(database, key))

    async def references(self) -> Counter[Digest]:
        """See `BuildIndex`."""
        return await self._survey(tables.references)

    async def needed(self, digests: Iterable[Digest]) -> set[Digest]:
        """See `BuildIndex`."""
        wanted = list(digests)
        return await self._survey(lambda database: tables.needed(database, wanted))

    async def forget_image(self, key: str, used_before: float) -> bool:
        """See `BuildIndex`."""
        return await self._write(lambda database: tables.forget_image(database, key, used_before), False)

    async def forget_layers(self, digests: Iterable[Digest]) -> None:
        """See `BuildIndex`."""
        gone = list(digests)
        await self._write(lambda database: tables.drop_layers(database, gone), None)

    async def forget_recipes(self, remembered: int) -> None:
        """See `BuildIndex`."""
        while await self._write(lambda database: tables.drop_collected(database, remembered, _BATCH), 0):
            pass
        await self._write(lambda database: tables.drop_image_indexes(database, remembered), None)

    def close(self) -> None:
        """Write what is still to be written, if it can be, and close the file; nothing may be called then."""
        if self._unwritten:
            with suppress(sqlite3.DatabaseError):
                self._writer.wait_for(partial(self._in_writing, lambda _: None))
        for thread in (self._surveyor, self._reader, self._writer):
            thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, database: sqlite3.Connection) -> None:
        """Write to a new file what an older version remembers, once: it may have been collected since."""
        if not schema.was_moved_aside(self._path):
            migrations.carry_over(self._path.parent, database)

    async def _found(self, key: str) -> tables.FoundImage | None:
        return await self._look(lambda database: tables.image(database, key, self._known_layers), None)

    async def _used(self, key: str, last_used: float) -> bool:
        """Remember that an image is in use now; return whether it is kept, as far as is known."""
        now = self._clock()
        if abs(now - last_used) < self._use_interval:
            return True
        # On a full disk, or while another process has the file locked, images are still pulled.
        writing = asyncio.ensure_future(
            self._write(lambda database: tables.use_image(database, key, now), True)
        )
        try:
            async with asyncio.timeout(_PATIENCE):
                return await asyncio.shield(writing)
        except TimeoutError:
            return True

    async def _look(self, work: Work[T], otherwise: T, thread: "_Thread | None" = None) -> T:
        """Ask for something that can be found out again: if the file can't be read, it isn't known."""
        try:
            return await (thread or self._reader).run(partial(_in_transaction, "BEGIN", work))
        except sqlite3.DatabaseError as error:
            _log_unless_our_fault(error)
            return otherwise

    async def _survey(self, work: Work[T]) -> T:
        """Ask for something that decides about deletion: if the file can't be read, say so."""
        try:
            return await self._surveyor.run(partial(_in_transaction, "BEGIN", work))
        except (sqlite3.Error, UnreadableRecordError) as error:
            raise StorageError(f"{self._path} can't be read: {error}") from error

    async def _write(self, work: Work[T], otherwise: T) -> T:
        """Change something in one transaction, or not at all when it can't be written."""
        try:
            return await self._writer.run(partial(self._in_writing, work))
        except sqlite3.DatabaseError as error:
            _log_unless_our_fault(error)
            return otherwise

    async def _remember(self, work: Work[None]) -> bool:
        """Write something, or keep it in memory until it can be written; return whether it is written."""
        try:
            await self._writer.run(partial(self._in_writing, work))
        except sqlite3.DatabaseError as error:
            _log_unless_our_fault(error)
            await self._writer.run(lambda _: self._unwritten.append(work))
            return False
        return True

    def _in_writing(self, work: Work[T], database: sqlite3.Connection) -> T:
        """Do the work in one transaction, after what could not be written before it."""

        def all_of_it(connection: sqlite3.Connection) -> T:
            for earlier in self._unwritten:
                earlier(connection)
            return work(connection)

        try:
            done = _in_transaction("BEGIN IMMEDIATE", all_of_it, database)
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            # A mistake of ours, which would come again with every write.
            self._unwritten.clear()
            raise
        if self._unwritten:
            log.info("what could not be remembered is written now", records=len(self._unwritten))
            self._unwritten.clear()
            self._unwritten_images.clear()
        return done


class _Thread:
    """A connection, and the one thread that uses it; what is asked first is done first."""

    def __init__(self, database: sqlite3.Connection, name: str) -> None:
        self._database = database
        self._executor = ThreadPoolExecutor(1, name)

    async def run(self, work: Work[T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work, self._database)

    def wait_for(self, work: Work[T]) -> T:
        return self._executor.submit(work, self._database).result()

    def close(self) -> None:
        self._executor.shutdown()
        self._database.close()


def _in_transaction(begin: str, work: Work[T], database: sqlite3.Connection) -> T:
    """Do the work in a transaction: what it reads is of one moment, and what it writes is written at once."""
    database.execute(begin)
    try:
        done = work(database)
        database.execute("COMMIT")
        return done
    finally:
        if database.in_transaction:
            with suppress(sqlite3.DatabaseError):
                database.execute("ROLLBACK")


def _log_unless_our_fault(error: sqlite3.DatabaseError) -> None:
    """Log what a disk or a file does; raise what only a mistake in this room can cause."""
    if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):
        raise error
    log.warning("the build index can't be used", reason=str(error))
