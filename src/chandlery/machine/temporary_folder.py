"""Temporary files that don't outlive a process.

    tmp/<pid>-<random>/       what one process is writing
    tmp/<pid>-<random>/lock   held by that process as long as it lives

The kernel lets go of a lock (flock) when its process dies, by kill -9 too; so a folder whose lock is free was
left behind, and whoever comes next removes it. A `chandlery build` beside a running server is left alone.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Self

import structlog

from chandlery.errors import StorageFullError
from chandlery.machine.disk_errors import FULL, storage_errors
from chandlery.machine.locks import exclusive, is_locked, lock, open_lock

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()


class TemporaryFolder:
    """The files that this process is writing; opening it removes what dead processes left in `parent`.

    Raises `StorageError` when `parent` can't be made or written.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self.path = parent / f"{os.getpid()}-{token_hex(8)}"
        with storage_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with exclusive(parent):
                _sweep(parent)
                self.path.mkdir()
                self._lock = open_lock(self.path / "lock")
                lock(self._lock)

    @contextmanager
    def file(self) -> Iterator[Path]:
        """Yield a path to write a new file at; whatever is still there in the end is removed.

        A full disk in the body becomes `StorageFullError`.
        """
        path = self.path / token_hex(8)
        try:
            yield path
        except OSError as error:
            if error.errno in FULL:
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
        with storage_errors(self._parent), exclusive(self._parent):
            _sweep(self._parent)

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
        return is_locked(folder / "lock")
    except FileNotFoundError:
        return False
