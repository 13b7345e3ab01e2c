"""Tickets of the processes that wait for a slot: the one that has waited longest is first.

    <folder>/<random>.ticket   since when its process waits, and when it last looked (see `time.monotonic`)

A process that has just given a slot back would otherwise have it again before others see that it is free. A
process that hasn't looked for a while is dead, stuck or content, and keeps nobody waiting. Where no ticket
can be written, nobody waits for its process.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import TypeGuard

import msgspec

from chandlery.machine.age import age_of

_SUFFIX = ".ticket"
# Seconds after which a ticket counts no more; processes that wait look ten times a second.
_VOID_AFTER = 0.5
# Seconds after which what dead processes left is removed.
_SWEPT_AFTER = 60.0


class _Ticket(msgspec.Struct, frozen=True, array_like=True):
    since: float
    looked: float


class Tickets:
    """The tickets in a folder, as one process sees them; `clock` must be the same for all."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._file = folder / f"{token_hex(8)}{_SUFFIX}"
        self._own: _Ticket | None = None

    def sweep(self) -> None:
        """Remove what dead processes left."""
        for file in self._folder.glob(f"*{_SUFFIX}"):
            if age_of(file) > _SWEPT_AFTER:
                file.unlink(missing_ok=True)

    def is_first(self) -> bool:
        """Return whether no other process has waited for longer than this one."""
        now = self._clock()
        since = self._own.since if self._is_good(self._own, now) else now
        return not any(
            self._is_good(each, now) and each.since < since
            for each in map(_read, self._folder.glob(f"*{_SUFFIX}"))
        )

    def keep(self) -> None:
        """Take a ticket, or keep the one that this process has."""
        now = self._clock()
        self._own = _Ticket(self._own.since if self._is_good(self._own, now) else now, now)
        with suppress(OSError):
            self._file.write_bytes(msgspec.json.encode(self._own))

    def give_back(self) -> None:
        """Wait no longer."""
        if self._own is not None:
            self._own = None
            with suppress(OSError):
                self._file.unlink()

    @staticmethod
    def _is_good(ticket: _Ticket | None, now: float) -> TypeGuard[_Ticket]:
        return ticket is not None and now - ticket.looked <= _VOID_AFTER


def _read(file: Path) -> _Ticket | None:
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(file.read_bytes(), type=_Ticket)
    return None
