"""Who builds what, among all processes that share a data folder: each key once, and a few keys at once.

    <folder>/<key>.building   the id of the build; locked by the process that has it
    <folder>/slots/<number>   locked by a build that runs; there are as many as may run at once

The kernel lets go of a lock (flock) when its process dies, by kill -9 too, so nothing is left to be freed.
The time of a `.building` file is when somebody in another process last waited for that build.
"""

import fcntl
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

import structlog

from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.locks import try_lock

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_SUFFIX = ".building"

# Bytes of a build's id, at most.
_LONGEST_ID = 64


class Claim:
    """One key, which no other process can claim until this is given back; see `BuildClaims.claim`."""

    def __init__(self, file: Path, descriptor: int | None) -> None:
        self._file = file
        self._descriptor = descriptor

    def give_back(self) -> None:
        """Let others claim the key."""
        if self._descriptor is not None:
            # While it is locked: nobody can have claimed the file that goes.
            with suppress(OSError):
                self._file.unlink()
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


class BuildClaims:
    """The claims of one process, in a folder that it shares; at most `slots` builds run at once, over all.

    What can't be written there is logged, and given all the same: better a build twice than none.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        self._folder = folder
        self._slots = [folder / "slots" / str(number) for number in range(slots)]

    def open(self) -> None:
        """Make what isn't there yet, and remove what dead processes left. Raises `StorageError`."""
        with storage_errors(self._folder):
            (self._folder / "slots").mkdir(parents=True, exist_ok=True)
        for file in self._folder.glob(f"*{_SUFFIX}"):
            left = self.claim(file.name.removesuffix(_SUFFIX))
            if left is not None:
                left.give_back()

    def claim(self, key: str, build_id: str = "") -> Claim | None:
        """Claim a key, unless somebody has it; `build_id` is what others are told."""
        file = self._file(key)
        while True:
            try:
                descriptor = _locked(file)
            except OSError as error:
                log.warning("a build can't be claimed", file=str(file), reason=error.strerror)
                return Claim(file, None)
            if descriptor is None:
                return None
            # Whoever had it may have removed the file since it was opened here.
            if os.fstat(descriptor).st_nlink:
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, build_id.encode())
                return Claim(file, descriptor)
            os.close(descriptor)

    def slot(self) -> ExitStack | None:
        """Take one of the slots, until what this gives is closed; None if all are taken."""
        for file in self._slots:
            try:
                descriptor = _locked(file)
            except OSError as error:
                log.warning("builds can't be counted", file=str(file), reason=error.strerror)
                return ExitStack()
            if descriptor is not None:
                taken = ExitStack()
                taken.callback(os.close, descriptor)
                return taken
        return None

    def holder(self, key: str) -> str | None:
        """Give the id of the build that somebody has of a key, maybe empty; None if nobody has one."""
        with suppress(OSError), self._file(key).open("rb", buffering=0) as file:
            if not try_lock(file.fileno(), fcntl.LOCK_SH):
                return file.read(_LONGEST_ID).decode(errors="replace")
        return None

    def wait_for(self, key: str) -> None:
        """Note that somebody waits for the build that another process has of a key."""
        with suppress(OSError):
            os.utime(self._file(key))

    def waited_for(self, key: str) -> float:
        """Tell how many seconds ago somebody in another process waited for the build here, or it began."""
        with suppress(OSError):
            return max(0.0, time.time() - self._file(key).stat().st_mtime)
        return float("inf")

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def _locked(file: Path) -> int | None:
    """Open a file, which is made for it, and lock it; None if it is locked already."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with ExitStack() as undo:
        undo.callback(os.close, descriptor)
        if try_lock(descriptor):
            undo.pop_all()
            return descriptor
    return None
