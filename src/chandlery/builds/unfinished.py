"""Builds that a process began and didn't end, so that another one takes them over.

    builds/<key>.unfinished   what is built, and how many began with it; its owner has the lock of the key

A server that is stopped leaves the files of what it was building; so does one that is killed. A build that
has brought down server after server is not begun a third time by itself: whoever wants it must ask for it.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import structlog

from chandlery.builds.locks import BuildLocks
from chandlery.builds.recipe import Recipe

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_SUFFIX = ".unfinished"
# How many processes begin with a build, the one that was asked for it included.
_MOST_BEGINNINGS = 2


class _Record(msgspec.Struct, frozen=True):
    recipe: Recipe = msgspec.field(name="origin")  # as in records of earlier versions
    beginnings: int = 1


class UnfinishedBuilds:
    """The builds in a folder that have begun and not ended. What can't be written is logged and forgotten."""

    def __init__(self, folder: Path, locks: BuildLocks) -> None:
        self._folder = folder
        self._locks = locks
        self._beginnings: dict[str, int] = {}

    @contextmanager
    def begun(self, recipe: Recipe) -> Iterator[None]:
        """Keep a record of a build until it ends, well or not; if it is cancelled the record stays."""
        self._record(_Record(recipe, self._beginnings.pop(recipe.key, 0) + 1))
        try:
            yield
        except asyncio.CancelledError:
            raise
        except BaseException:
            self.forget(recipe)
            raise
        self.forget(recipe)

    def forget(self, recipe: Recipe) -> None:
        """Remove the record of a build that has ended."""
        with suppress(OSError):
            self._file(recipe).unlink()

    async def take_over(self) -> list[Recipe]:
        """Return what the dead have left, and remove the records: whoever begins with one makes a new one."""
        taken = []
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            with suppress(OSError):
                lock = await self._locks.acquire(path.name.removesuffix(_SUFFIX))
                if lock is None:
                    continue  # another process is at it
                try:
                    record = _decode(path.read_bytes(), path)
                    path.unlink()
                finally:
                    await lock.release()
                if record is None:
                    continue
                if record.beginnings < _MOST_BEGINNINGS:
                    self._beginnings[record.recipe.key] = record.beginnings
                    taken.append(record.recipe)
                else:
                    log.warning("a build is given up", image=record.recipe.title, begun=record.beginnings)
        return taken

    def _file(self, recipe: Recipe) -> Path:
        return self._folder / f"{recipe.key}{_SUFFIX}"

    def _record(self, record: _Record) -> None:
        try:
            # With a buffer, what had no space would be tried again when the file is closed.
            with self._file(record.recipe).open("wb", buffering=0) as file:
                file.write(msgspec.json.encode(record))
        except OSError as error:
            log.warning("a build can't be recorded", image=record.recipe.title, reason=str(error))


def _decode(content: bytes, path: Path) -> _Record | None:
    try:
        return msgspec.json.decode(content, type=_Record)
    except msgspec.DecodeError as error:
        log.warning("the record of a build can't be read", file=str(path), reason=str(error))
        return None
