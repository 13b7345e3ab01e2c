"""From where users have logged in: guesses from elsewhere don't keep a user out who comes from there.

A file has when that was, under hashes of user and network; it outlives the server, since an attack may too.
"""

import time
from collections.abc import Callable
from pathlib import Path

import structlog

from chandlery.machine.times import SharedTimes, Times, TimesInMemory

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Seconds.
_KNOWN_FOR = 90 * 86400.0
_NOTED_AGAIN = 86400.0

_MOST = 10_000


class KnownAddresses:
    """The networks that users have logged in from within 90 days: as many as there is room for."""

    def __init__(self, times: Times | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._times = TimesInMemory(_MOST) if times is None else times
        self._clock = clock

    @classmethod
    def in_file(cls, file: Path) -> "KnownAddresses":
        """Return those of a file, made if need be; where that fails, they last as long as this process."""
        try:
            return cls(SharedTimes(file))
        except OSError as error:
            log.warning("from where users log in is forgotten at the next start", reason=str(error))
            return cls()

    def knows(self, user: str, network: str) -> bool:
        """Return whether a user has logged in from a network."""
        return self._clock() - self._times.get(_name(user, network)) < _KNOWN_FOR

    def note(self, user: str, network: str) -> None:
        """Remember that a user logged in from a network."""
        now = self._clock()
        # Of a clock that was ahead: it would be known for too long.
        self._times.change(
            _name(user, network), lambda noted: noted if 0 <= now - noted < _NOTED_AGAIN else now
        )


def _name(user: str, network: str) -> str:
    # No network has a space in it.
    return f"{network} {user}"
