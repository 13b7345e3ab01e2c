"""Who builds what, among all processes that share the work: each key once, and a few keys at once.

A lock is free again when its owner dies, however it dies. What can't be written down is logged, and the lock
is given all the same: better a build twice than none. All methods are coroutines, so that locks may be files
of this machine (`FileBuildLocks`) or kept where several machines see them;
`tests/support/build_locks_contract.py` says what every implementation keeps.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import structlog

from chandlery.machine.age import age_of
from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.locks import open_locked, try_lock

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_SUFFIX = ".building"

# Bytes of a build's id, at most.
_LONGEST_ID = 64


class BuildLock(Protocol):
    """What nobody else has until it is released."""

    async def release(self) -> None:
        """Let others have it; once is enough."""
        ...


class BuildLocks(Protocol):
    """The locks of builds, as one process sees them."""

    async def acquire(self, key: str, build_id: str = "") -> BuildLock | None:
        """Return the lock of a key, or None if it has an owner; `build_id` is what others are told."""
        ...

    async def slot(self) -> BuildLock | None:
        """Return one of as many slots as builds may run at once, over all; None if all are taken."""
        ...

    async def owner(self, key: str) -> str | None:
        """Return the id of the build that has a key's lock, maybe empty; None if it is free."""
        ...

    async def note_waiter(self, key: str) -> None:
        """Note that a client waits here for the build that another process has of a key."""
        ...

    async def last_waiter(self, key: str) -> float:
        """Return how many seconds ago a client waited for a build in another process, or it began."""
        ...


class FileBuildLocks:
    """Locks in a folder that processes of this machine share; at most `slots` builds run at once.

        <folder>/<key>.building   the id of the build; locked by the process that has it
        <folder>/slots/<number>   locked by a build that runs

    The time of a `.building` file is that of the last waiter in another process.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        self._folder = folder
        self._slots = [folder / "slots" / str(number) for number in range(slots)]

    async def open(self) -> None:
        """Make what isn't there yet, and remove what dead processes left. Raises `StorageError`."""
        with storage_errors(self._folder):
            (self._folder / "slots").mkdir(parents=True, exist_ok=True)
        for file in self._folder.glob(f"*{_SUFFIX}"):
            left = await self.acquire(file.name.removesuffix(_SUFFIX))
            if left is not None:
                await left.release()

    async def acquire(self, key: str, build_id: str = "") -> BuildLock | None:
        """See `BuildLocks`."""
        file = self._file(key)
        while True:
            try:
                descriptor = open_locked(file)
            except OSError as error:
                log.warning("a build can't be locked", file=str(file), reason=error.strerror)
                return _FileLock(None)
            if descriptor is None:
                return None
            # Its last owner may have removed the file since it was opened here.
            if os.fstat(descriptor).st_nlink:
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, build_id.encode())
                return _FileLock(descriptor, file)
            os.close(descriptor)

    async def slot(self) -> BuildLock | None:
        """See `BuildLocks`."""
        for file in self._slots:
            try:
                descriptor = open_locked(file)
            except OSError as error:
                log.warning("builds can't be counted", file=str(file), reason=error.strerror)
                return _FileLock(None)
            if descriptor is not None:
                return _FileLock(descriptor)
        return None

    async def owner(self, key: str) -> str | None:
        """See `BuildLocks`."""
        with suppress(OSError), self._file(key).open("rb", buffering=0) as file:
            if not try_lock(file.fileno(), shared=True):
                return file.read(_LONGEST_ID).decode(errors="replace")
        return None

    async def note_waiter(self, key: str) -> None:
        """See `BuildLocks`."""
        with suppress(OSError):
            os.utime(self._file(key))

    async def last_waiter(self, key: str) -> float:
        """See `BuildLocks`."""
        return age_of(self._file(key))

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


class _FileLock:
    """An open and locked file, which is removed with the lock if it is named; without one, nothing is."""

    def __init__(self, descriptor: int | None, file: Path | None = None) -> None:
        self._descriptor = descriptor
        self._file = file

    async def release(self) -> None:
        """See `BuildLock`."""
        if self._descriptor is None:
            return
        if self._file is not None:
            # While it is locked: nobody can have locked the file that goes.
            with suppress(OSError):
                self._file.unlink()
        os.close(self._descriptor)
        self._descriptor = None
