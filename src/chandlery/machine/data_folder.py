"""What the stores share in the data folder: errors, a lock, and temporary files that don't outlive a process.

    tmp/<pid>-<random>/       what one process is writing
    tmp/<pid>-<random>/lock   held by that process as long as it lives

The kernel lets go of a lock (flock) when its process dies, by kill -9 too; so a folder whose lock is free was
left behind, and whoever comes next removes it. A `chandlery build` beside a running server is left alone.

    running                   is there while a server runs, and after it was killed; then it says since when
                              files are in doubt
"""

import asyncio
import errno
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Self

import structlog

from chandlery.errors import StorageError, StorageFullError

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})

# Bytes.
_LEAST_SPACE = 1 << 20

# Seconds between looks at a lock that others hold, mostly for milliseconds.
_POLL = 0.005
# Likewise, where they hold it as long as they live.
_SUCCESSION = 1.0

# Bytes of a time that is written down.
_LONGEST_TIME = 32


@contextmanager
def storage_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about `folder` into `StorageError` and `StorageFullError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(str(folder)) from error
        advice = "let the user that runs chandlery write there, or " if error.errno in _DENIED else ""
        raise StorageError(
            f"{error.filename or folder}: {error.strerror}: {advice}choose another data folder"
        ) from error


def is_full(folder: Path) -> bool:
    """Tell whether a folder's disk is as good as full, whatever a program that wrote there calls it."""
    return shutil.disk_usage(folder).free < _LEAST_SPACE


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that lock the same folder waiting, for a moment: while it is opened."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked_file(file: Path) -> Iterator[None]:
    """Likewise, with a file of its own that is made for it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def durably_replace(file: Path, content: bytes) -> None:
    """Write a small file: a kill or a power cut leaves the old content or the new. One process at a time."""
    aside = file.with_name(f"{file.name}.new")
    with aside.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    aside.rename(file)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@asynccontextmanager
async def holding(folder: Path, operation: int = fcntl.LOCK_EX) -> AsyncIterator[None]:
    """Hold a folder's lock, against others of this process as well (flock(2): LOCK_EX or LOCK_SH).

    The event loop goes on while others have it, and no thread waits.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while not try_lock(descriptor, operation):  # noqa: ASYNC110 (a lock has no event)
            await asyncio.sleep(_POLL)
        yield
    finally:
        os.close(descriptor)


@asynccontextmanager
async def on_duty(file: Path) -> AsyncIterator[None]:
    """Wait until no other process does what this file stands for: one does, until it ends or dies."""
    with storage_errors(file.parent):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        while not try_lock(descriptor):  # noqa: ASYNC110 (a lock has no event)
            await asyncio.sleep(_SUCCESSION)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, operation: int = fcntl.LOCK_EX) -> bool:
    """Take the lock of an open file or folder (flock(2): LOCK_EX or LOCK_SH), unless others have it."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class TemporaryFolder:
    """The files that this process is writing; opening it removes what dead processes left in `parent`.

    Raises `StorageError` when `parent` can't be made or written.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self.path = parent / f"{os.getpid()}-{token_hex(8)}"
        with storage_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent):
                _sweep(parent)
                self.path.mkdir()
                self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(self._lock, fcntl.LOCK_EX)

    @contextmanager
    def file(self) -> Iterator[Path]:
        """Give a path to write a new file at; whatever is still there in the end is removed.

        A full disk in the body becomes `StorageFullError`.
        """
        path = self.path / token_hex(8)
        try:
            yield path
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFullError(str(self.path.parent)) from error
            raise
        finally:
            path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise `StorageError` unless files can be written here."""
        with storage_errors(self.path), self.file() as file:
            file.write_bytes(b"written")

    def sweep(self) -> None:
        """Remove what processes that died since have left."""
        with storage_errors(self._parent), locked(self._parent):
            _sweep(self._parent)

    def close(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RunMarker:
    """A file in `folder` that tells after a crash which files may have been damaged by it.

    Its time is when all that had been written until then was known to be whole. Servers that are alive share
    a lock of it: so one that follows another without a gap isn't taken for one that follows a crash. Several
    may begin at once after a crash: the first writes down since when files are in doubt, for the others too.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "running"

    def is_held(self) -> bool:
        """Tell whether a server runs; what the file says is left as it is."""
        try:
            lock = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not try_lock(lock)
        finally:
            os.close(lock)

    def begin(self) -> float | None:
        """Note that a server runs; give since when files are in doubt, or None if none was killed."""
        folder = self._file.parent
        with storage_errors(folder), locked(folder):
            was_there = self._file.exists()
            self._lock = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            since = self._in_doubt_since()
            if since is None and was_there and self._is_alone():
                since = self._file.stat().st_mtime
                os.pwrite(self._lock, str(since).encode(), 0)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        return since

    def whole(self) -> None:
        """Note that everything is whole that was written until now."""
        os.truncate(self._lock, 0)
        os.utime(self._lock)

    def end(self) -> None:
        """Note that the server ends; unless all is known to be whole, the next one begins with a check."""
        if self._in_doubt_since() is None and self._is_alone():
            self._file.unlink(missing_ok=True)
        os.close(self._lock)

    def _in_doubt_since(self) -> float | None:
        """Give what the file says, in seconds since the epoch; None if nothing is in doubt."""
        content = os.pread(self._lock, _LONGEST_TIME, 0)
        try:
            return float(content) if content else None
        except ValueError:  # written by halves, or by somebody else
            return 0.0

    def _is_alone(self) -> bool:
        return try_lock(self._lock)


def _sweep(parent: Path) -> None:
    """Remove the folders of dead processes; `parent` is locked, so no folder is half made."""
    for folder in sorted(parent.iterdir()):
        if folder.is_dir() and not _is_alive(folder):
            log.info("removing what a dead process left", folder=str(folder))
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(folder: Path) -> bool:
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(lock, fcntl.LOCK_EX)
    finally:
        os.close(lock)
