"""Locks between processes (flock(2)): the kernel frees them when a process dies, by kill -9 too.

What is locked is a file or a folder that is open, by its descriptor: closing it frees the lock. A shared lock
keeps out those who want it for themselves. Two descriptors exclude each other within one process as well.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from chandlery.machine.disk_errors import storage_errors

# Seconds between looks at a lock that others hold, mostly for milliseconds.
_POLL = 0.005
# Likewise, where they hold it as long as they live.
_SUCCESSION = 1.0


def open_lock(path: Path, *, make: bool = True) -> int:
    """Return the descriptor of a file that can be locked, made if need be; or else of a folder, too."""
    return os.open(path, (os.O_RDWR | os.O_CREAT if make else os.O_RDONLY) | os.O_CLOEXEC, 0o666)


def lock(descriptor: int, *, shared: bool = False) -> None:
    """Take the lock of an open file or folder; the thread waits until others have freed it."""
    fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take the lock of an open file or folder; return False if others have it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_locked(file: Path) -> int | None:
    """Return the descriptor of a file, which is made if need be and locked here; None if others have it."""
    descriptor = open_lock(file)
    if try_lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def unlock(descriptor: int) -> None:
    """Free the lock of a file or folder that stays open."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_locked(path: Path) -> bool:
    """Return whether somebody has the lock of a file or folder. Raises `FileNotFoundError`."""
    with _opened(path, make=False) as descriptor:
        return not try_lock(descriptor)


@contextmanager
def exclusive(path: Path, *, make: bool = False) -> Iterator[None]:
    """Keep others that want the same lock waiting, for a moment; `make` a file for it if need be."""
    with _opened(path, make=make) as descriptor:
        lock(descriptor)
        yield


@asynccontextmanager
async def holding(path: Path, *, shared: bool = False, make: bool = False) -> AsyncIterator[None]:
    """Hold a lock, alone or `shared` with others; `make` a file for it if need be.

    The event loop goes on while others have it, and no thread waits.
    """
    with _opened(path, make=make) as descriptor:
        while not try_lock(descriptor, shared=shared):  # noqa: ASYNC110 (a lock has no event)
            await asyncio.sleep(_POLL)
        yield


@asynccontextmanager
async def leader(file: Path) -> AsyncIterator[None]:
    """Wait until this process leads in what a file stands for: one does, until it ends or dies.

    Raises `StorageError` if the file can't be made.
    """
    with storage_errors(file.parent):
        descriptor = open_lock(file)
    try:
        while not try_lock(descriptor):  # noqa: ASYNC110 (a lock has no event)
            await asyncio.sleep(_SUCCESSION)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path, *, make: bool) -> Iterator[int]:
    descriptor = open_lock(path, make=make)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
