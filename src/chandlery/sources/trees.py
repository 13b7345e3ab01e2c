"""Package sets that were unpacked, copied or checked out, by revision; what is there is whole, and stays so.

    <folder>/<revision>/source     the package set
    <folder>/making/<random>/      one that is being made; who makes it holds its lock (flock)
    <folder>/lock                  held for moments: while one gets its name, or goes

A tree is made aside, synced and renamed. The time of a revision's folder is when it was last handed out. The
newest is kept, then those that are wanted (`keep`), then the newer ones. One that was handed out within the
last hour never goes: an evaluation may be reading it. Since a client may choose revisions, no new ones are
made while there are very many of those. Processes may share the folder.
"""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from secrets import token_hex

import structlog

from chandlery.errors import TooManyReferencesError
from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.locks import exclusive, is_locked, lock, open_lock

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Fetchers of Nix name the store path of a package set so, and its name may reach hashes.
TREE_NAME = "source"

_MAKING = "making"
# A tree that is handed out again within so many seconds isn't touched again.
_TOUCH_INTERVAL = 60.0


class SourceTrees:
    """The trees of one source: `most` are kept, and those in use, which are at most `most_in_use`."""

    def __init__(
        self,
        folder: Path,
        source: str,
        *,
        most: int = 8,
        most_in_use: int = 32,
        in_use_for: float = 3600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._source = source
        self._most = most
        self._most_in_use = most_in_use
        self._in_use_for = in_use_for
        self._clock = clock
        self._wanted: Sequence[str] = ()
        self._making: dict[str, asyncio.Lock] = {}

    def get(self, revision: str) -> Path | None:
        """Hand out the tree of a revision, if it is there; it stays for an hour at least."""
        folder = self._folder / revision
        try:
            if abs(self._clock() - folder.stat().st_mtime) >= _TOUCH_INTERVAL:
                with self._locked():
                    self._touch(folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            log.warning("a tree can't be marked as used", tree=str(folder), reason=str(error))
        return folder / TREE_NAME

    def revision(self, beginning: str) -> str | None:
        """Return the revision of the tree that begins so; None without one, or with several."""
        found = [each for each in self._revisions() if each.startswith(beginning)]
        return found[0] if len(found) == 1 else None

    def keep(self, revisions: Sequence[str]) -> None:
        """Let these revisions be the last to go; the most wanted comes first."""
        self._wanted = tuple(revisions)

    async def make(self, revision: str, fill: Callable[[Path], Awaitable[None]]) -> Path:
        """Hand out the tree of a revision; if it isn't there, `fill` makes it at the path that it gets.

        Whoever asks for the same revision meanwhile waits for it. What `fill` raises is raised, and a full
        disk as `StorageFullError`; nothing half made is left. `TooManyReferencesError` if too many are in
        use.
        """
        making = self._making.setdefault(revision, asyncio.Lock())
        try:
            async with making:
                found = self.get(revision)
                if found is not None:
                    return found
                with storage_errors(self._folder):
                    await asyncio.to_thread(self._make_room, revision)
                    async with self._aside() as aside:
                        await fill(aside / TREE_NAME)
                        await asyncio.to_thread(self._name, aside, revision)
        finally:
            # Those who wait have it already, and find the tree made.
            self._making.pop(revision, None)
        await asyncio.to_thread(self._remove_old)
        return self._folder / revision / TREE_NAME

    def _revisions(self) -> list[str]:
        try:
            return [each for each in os.listdir(self._folder) if (self._folder / each / TREE_NAME).exists()]
        except FileNotFoundError:
            return []

    def _touch(self, folder: Path) -> None:
        now = self._clock()
        os.utime(folder, (now, now))

    def _locked(self) -> AbstractContextManager[None]:
        return exclusive(self._folder / "lock", make=True)

    @asynccontextmanager
    async def _aside(self) -> AsyncIterator[Path]:
        """Yield a folder that goes in the end, and after a crash, unless it was renamed."""
        aside = self._folder / _MAKING / token_hex(8)
        with self._locked():
            aside.mkdir()
            made = open_lock(aside, make=False)
            lock(made)
        try:
            yield aside
        finally:
            try:
                if aside.exists():
                    await asyncio.shield(asyncio.to_thread(_remove, aside))
            finally:
                os.close(made)

    def _name(self, aside: Path, revision: str) -> None:
        # After a power cut, what has a name must be whole.
        os.sync()
        with self._locked():
            self._touch(aside)
            # Another process may have made the same.
            if not (self._folder / revision).exists():
                aside.rename(self._folder / revision)

    def _make_room(self, revision: str) -> None:
        """Remove what crashes left; see that there aren't too many trees already."""
        making = self._folder / _MAKING
        making.mkdir(parents=True, exist_ok=True)
        with self._locked():
            left = [each for each in making.iterdir() if _is_left(each)]
        for each in left:
            log.info("removing what a crash left", folder=str(each))
            _remove(each)
        in_use = [each for each in self._revisions() if self._is_in_use(each)]
        if len(in_use) >= self._most_in_use:
            log.warning("too many revisions are in use", source=self._source, refused=revision)
            raise TooManyReferencesError(self._source)

    def _last_use(self, revision: str) -> float:
        try:
            return (self._folder / revision).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _is_in_use(self, revision: str) -> bool:
        # One that was used in what is the future now tells nothing: the clock was wrong then.
        return abs(self._clock() - self._last_use(revision)) < self._in_use_for

    def _remove_old(self) -> None:
        rank = {revision: number for number, revision in enumerate(self._wanted)}
        newest_first = sorted(self._revisions(), key=lambda each: (-self._last_use(each), each))
        # What is current may not be wanted by any image yet.
        by_worth = newest_first[:1] + sorted(newest_first[1:], key=lambda each: rank.get(each, len(rank)))
        for revision in by_worth[self._most :]:
            aside = self._folder / _MAKING / token_hex(8)
            with self._locked():
                # It may have been handed out since.
                if self._is_in_use(revision):
                    continue
                with suppress(FileNotFoundError):
                    (self._folder / revision).rename(aside)
            log.info("a revision is removed", source=self._source, revision=revision)
            _remove(aside)


def _is_left(folder: Path) -> bool:
    """Return whether nobody who makes this holds its lock any more."""
    try:
        return not is_locked(folder)
    except OSError:
        return False


def _remove(folder: Path) -> None:
    """Remove a folder, also where somebody may not write."""

    def allow(_: object, path: str, __: object) -> None:
        with suppress(OSError):
            for each in (os.path.dirname(path), path):  # noqa: PTH120
                if os.path.isdir(each) and not os.path.islink(each):  # noqa: PTH112, PTH114
                    os.chmod(each, 0o700)  # noqa: PTH101
            if os.path.isdir(path) and not os.path.islink(path):  # noqa: PTH112, PTH114
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)  # noqa: PTH108

    shutil.rmtree(folder, onerror=allow)
