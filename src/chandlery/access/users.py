"""The users of an htpasswd file, as `htpasswd -B` of Apache writes it: a name, a colon, a bcrypt hash.

A hash costs a tenth of a second, and clients send the password with every request. So what was right is
remembered for a while, under a keyed hash that says nothing without this process's key. What is wrong takes
as long as the costliest hash of the file, whether there is such a user or not, and however cheap its own hash
is. A few hashes are computed at once and no more, and the event loop computes none. The file is read again
when it changes; while it can't be read, the users are those that it had.
"""

import asyncio
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import bcrypt
import structlog
from cachetools import TTLCache

from chandlery.errors import SettingsError

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Apache writes $2y$; the costs are those that htpasswd offers. The last character of a salt has two bits.
_HASH = re.compile(r"\$2[aby]\$(0[4-9]|1[0-7])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
# bcrypt reads no more of a password, and Apache cuts the rest off.
_PASSWORD_BYTES = 72

# Of a file without users; htpasswd's own default.
_USUAL_COST = 5

_REMEMBERED_SECONDS = 300.0
_MOST_REMEMBERED = 1_000
HASHES_AT_ONCE = 2


class Users:
    """The users of a file; `SettingsError` if it can't be read or holds something else."""

    def __init__(
        self,
        file: Path,
        *,
        checkpw: Callable[[bytes, bytes], bool] = bcrypt.checkpw,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._checkpw = checkpw
        self._signature = _signature(file)
        self._hashes = _read(file)
        self._proven: TTLCache[bytes, bool] = TTLCache(_MOST_REMEMBERED, _REMEMBERED_SECONDS, timer=clock)
        self._key = secrets.token_bytes(32)
        self._slots = asyncio.Semaphore(HASHES_AT_ONCE)

    def remembers(self, user: str, password: str) -> bool:
        """Return whether this was found right a short time ago."""
        self._refresh()
        stored = self._hashes.get(user)
        return stored is not None and self._proof(stored, password) in self._proven

    async def check(self, user: str, password: str) -> bool:
        """Return whether there is such a user with this password."""
        self._refresh()
        stored = self._hashes.get(user)
        highest = max(map(_cost, self._hashes.values()), default=_USUAL_COST)
        proof = b"" if stored is None else self._proof(stored, password)
        async with self._slots:
            # A request beside this one may have had the same question.
            if proof not in self._proven:
                if not await asyncio.to_thread(self._is_right, stored, _cut(password), highest):
                    return False
                self._proven[proof] = True
        return True

    def version(self, user: str) -> str | None:
        """Return what changes with a user's password and tells nothing about it; None if there is no user."""
        self._refresh()
        stored = self._hashes.get(user)
        return None if stored is None else hashlib.sha256(stored.encode()).hexdigest()[:16]

    def _proof(self, stored: str, password: str) -> bytes:
        # With the hash in it: a new password makes what is remembered of the old one worthless.
        return hashlib.blake2b(b"%s:%s" % (stored.encode(), _cut(password)), key=self._key).digest()

    def _is_right(self, stored: str | None, password: bytes, highest: int) -> bool:
        """Compare a password with a hash, or with none; what is wrong takes 2 ** `highest` rounds in all."""
        if stored is None:
            costs = [highest]
        elif self._checkpw(password, stored.encode()):
            return True
        else:
            # Each cost is twice the one before: with the hash of cost 5, those of 5, 6 and 7 are one of 8.
            costs = [*range(_cost(stored), highest)]
        for cost in costs:
            self._checkpw(password, f"$2b${cost:02}${'.' * 53}".encode())
        return False

    def _refresh(self) -> None:
        signature = _signature(self._file)
        if signature != self._signature:
            # Before the content is read: what is written meanwhile is seen the next time.
            self._signature = signature
            try:
                self._hashes = _read(self._file)
            except SettingsError as error:
                log.error("the users are still those that they were", reason=str(error))


def _cost(stored: str) -> int:
    return int(stored[4:6])


def _cut(password: str) -> bytes:
    return password.encode()[:_PASSWORD_BYTES]


def _signature(file: Path) -> tuple[int, ...]:
    """Return what changes with a file's content; nothing if there is no file."""
    try:
        status = os.stat(file)  # noqa: PTH116 (every request does this, and Path.stat takes twice the time)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(file: Path) -> Mapping[str, str]:
    try:
        content = file.read_text()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        raise SettingsError(f"users_file: {file} can't be read: {reason}") from error
    hashes = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, _, stored = line.strip().partition(":")
        # The line may hold a password as it is: only its number is told.
        if not user or _HASH.fullmatch(stored) is None:
            raise SettingsError(
                f"users_file: line {number} of {file} is not a name and a bcrypt hash, "
                "as `htpasswd -B` writes them"
            )
        hashes[user] = stored
    return hashes
