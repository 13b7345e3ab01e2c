"""Locks between processes (flock(2)): the kernel frees them when a process dies, by kill -9 too."""

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


def open_locked(file: Path) -> int | None:
    """Open a file, which is made if it isn't there, and take its lock; None if it is locked already."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if try_lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def is_locked(descriptor: int) -> bool:
    """Return whether another process has the lock of an open file; if none has, it is shared from now on."""
    return not try_lock(descriptor, fcntl.LOCK_SH)
