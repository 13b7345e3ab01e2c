"""What the stores share in the data folder: errors, a lock, and temporary files that don't outlive a process.

    tmp/<pid>-<random>/       what one process is writing
    tmp/<pid>-<random>/lock   held by that process as long as it lives

The kernel lets go of a lock (flock) when its process dies, by kill -9 too; so a folder whose lock is free was
left behind, and whoever comes next removes it. A `chandlery build` beside a running server is left alone.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Self

import structlog

from chandlery.errors import StorageError, StorageFullError

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that lock the same folder waiting, for a moment: while it is opened."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class TemporaryFolder:
    """The files that this process is writing; opening it removes what dead processes left in `parent`.

    Raises `StorageError` when `parent` can't be made or written.
    """

    def __init__(self, parent: Path) -> None:
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

    def close(self) -> None:
        """Remove the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
