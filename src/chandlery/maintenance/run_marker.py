"""Whether a server was killed, and since when files are in doubt.

running   there while a server runs, and after it was killed; then it says since when files are in doubt
"""

import os
from pathlib import Path

from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.locks import exclusive, is_locked, lock, open_lock, try_lock

# Bytes of a time that is written down.
_LONGEST_TIME = 32


class RunMarker:
    """A file in `folder` that tells after a crash which files may have been damaged by it.

    Its time is when all that had been written until then was known to be whole. Servers that are alive share
    a lock of it: so one that follows another without a gap isn't taken for one that follows a crash. Several
    may begin at once after a crash: the first writes down since when files are in doubt, for the others too.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "running"

    def is_held(self) -> bool:
        """Return whether a server runs; what the file says is left as it is."""
        try:
            return is_locked(self._file)
        except FileNotFoundError:
            return False

    def begin(self) -> float | None:
        """Note that a server runs; give since when files are in doubt, or None if none was killed."""
        folder = self._file.parent
        with storage_errors(folder), exclusive(folder):
            was_there = self._file.exists()
            self._lock = open_lock(self._file)
            since = self._in_doubt_since()
            if since is None and was_there and self._is_alone():
                since = self._file.stat().st_mtime
                os.pwrite(self._lock, str(since).encode(), 0)
            lock(self._lock, shared=True)
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
        """Return what the file says, in seconds since the epoch; None if nothing is in doubt."""
        content = os.pread(self._lock, _LONGEST_TIME, 0)
        try:
            return float(content) if content else None
        except ValueError:  # written by halves, or by somebody else
            return 0.0

    def _is_alone(self) -> bool:
        return try_lock(self._lock)
