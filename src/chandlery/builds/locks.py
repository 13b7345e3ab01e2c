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

from chandlery.builds.tickets import Tickets
from chandlery.machine.age import age_of
from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.locks import open_locked, try_lock

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_SUFFIX = ".building"

# Bytes of a build's id, and of a client, at most.
_LONGEST_ID, _LONGEST_CLIENT = 64, 512


class BuildLock(Protocol):
    """What nobody else has until it is released."""

    async def release(self) -> None:
        """Let others have it; once is enough."""
        ...


class BuildSlot(BuildLock, Protocol):
    """One of the slots in which builds run; it is held for `client`."""

    @property
    def client(self) -> str:
        """The client for which it is held."""
        ...


class BuildLocks(Protocol):
    """The locks of builds, as one process sees them."""

    async def acquire(self, key: str, build_id: str = "") -> BuildLock | None:
        """Return the lock of a key, or None if it has an owner; `build_id` is what others are told."""
        ...

    async def slot(self, *clients: str) -> BuildSlot | None:
        """Return one of as many slots as builds may run at once, over all; None if there is none to have.

        It is for the first of the clients that may have one: the last ones may be reserved for those that
        have none yet. Of processes that ask again and again, the one that has waited longest is first.
        """
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

    Of the slots, so many are `reserved` for clients that have none.

        <folder>/<key>.building   the id of the build; locked by the process that has it
        <folder>/slots/<number>   the client of a build that runs; locked by that
        <folder>/slots/*.ticket   of processes that wait for one (`builds.tickets`)

    The time of a `.building` file is that of the last waiter in another process.
    """

    def __init__(self, folder: Path, slots: int, reserved: int = 0) -> None:
        self._folder = folder
        self._reserved = reserved
        self._slots = [folder / "slots" / str(number) for number in range(slots)]
        self._tickets = Tickets(folder / "slots")

    async def open(self) -> None:
        """Make what isn't there yet, and remove what dead processes left. Raises `StorageError`."""
        with storage_errors(self._folder):
            (self._folder / "slots").mkdir(parents=True, exist_ok=True)
            self._tickets.sweep()
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

    async def slot(self, *clients: str) -> BuildSlot | None:
        """See `BuildLocks`."""
        if not self._tickets.is_first():
            self._tickets.keep()
            return None
        free: list[int] = []
        holders = set[bytes]()
        try:
            for file in self._slots:
                descriptor = open_locked(file)
                if descriptor is None:
                    holders.add(file.read_bytes())
                else:
                    free.append(descriptor)
            if not free:
                self._tickets.keep()
                return None
            # Another process may have a client that may have what is free.
            self._tickets.give_back()
            for client in clients or ("",):
                if len(free) > (self._reserved if _as_bytes(client) in holders else 0):
                    return _FileSlot(free.pop(0), client)
        except OSError as error:
            log.warning("builds can't be counted", folder=str(self._folder), reason=error.strerror)
            return _FileSlot(None, next(iter(clients), ""))
        finally:
            for each in free:
                os.close(each)
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


class _FileSlot(_FileLock):
    """A slot, which says for which client it is held; it stays when it is released."""

    def __init__(self, descriptor: int | None, client: str) -> None:
        super().__init__(descriptor)
        self.client = client
        if descriptor is not None:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _as_bytes(client))


def _as_bytes(client: str) -> bytes:
    return client.encode(errors="surrogatepass")[:_LONGEST_CLIENT]
