"""Pins in a file (JSON), which processes share: each change is made to what the file has then, under a lock.

    <file>           pins by reference, and the details of every revision, the one pinned last at the end
    <file>.lock      held while the file is changed
    <file>.damaged   what stood there and was no such file

The file is read and written in threads. What it had is kept in memory; a second later it is looked whether it
has changed since.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import structlog

from chandlery.errors import StorageError
from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.durable import durably_replace
from chandlery.machine.locks import exclusive
from chandlery.sources.pin_store import StoredPin

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# A pin that is found to be as it was is written again when it is so many seconds younger.
_WRITE_INTERVAL = 60.0

# So many seconds after another process has changed a pin this one has it, too.
_LOOK_INTERVAL = 1.0


class _Table(msgspec.Struct, frozen=True):
    """What the file holds."""

    pins: dict[str, StoredPin] = {}
    revisions: dict[str, dict[str, str]] = {}


@dataclass(frozen=True, slots=True)
class _Change:
    """Pins to put (or to remove: None) by reference, and revisions to remember."""

    pins: Mapping[str, StoredPin | None] = field(default_factory=dict)
    revisions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class PinFile:
    """A `PinStore` in one file, which is made with the first pin."""

    def __init__(self, file: Path, *, most_pins: int = 256, most_revisions: int = 1024) -> None:
        self._file = file
        self._most_pins = most_pins
        self._most_revisions = most_revisions
        self._table = _Table()
        self._version: tuple[int, int] | None = None
        self._looked_at = float("-inf")
        self._used: dict[str, float] = {}
        self._written: dict[str, float] = {}  # how old the pins are that the file has
        self._turn = asyncio.Lock()

    async def pin(self, reference: str, *, latest: bool = False) -> StoredPin | None:
        """See `PinStore`."""
        if latest or time.monotonic() - self._looked_at >= _LOOK_INTERVAL:
            await self._look()
        return self._table.pins.get(reference)

    async def pins(self) -> Mapping[str, StoredPin]:
        """See `PinStore`."""
        await self._look()
        return {
            reference: msgspec.structs.replace(pin, used=max(pin.used, self._used.get(reference, 0.0)))
            for reference, pin in self._table.pins.items()
        }

    async def put(self, reference: str, pin: StoredPin) -> None:
        """See `PinStore`."""
        known = self._table.pins.get(reference)
        written = self._written.get(reference, float("-inf"))
        if known and known.revision == pin.revision and pin.resolved - written < _WRITE_INTERVAL:
            self._table.pins[reference] = pin
        else:
            self._written[reference] = pin.resolved
            await self._change(_Change({reference: pin}, {pin.revision: pin.details}))

    async def remove(self, reference: str) -> None:
        """See `PinStore`."""
        await self._change(_Change({reference: None}))

    def note_use(self, reference: str, at: float) -> None:
        """See `PinStore`."""
        self._used[reference] = at

    async def remember(self, revision: str, details: Mapping[str, str]) -> None:
        """See `PinStore`."""
        await self._change(_Change(revisions={revision: details}))

    async def revisions(self, beginning: str) -> Mapping[str, Mapping[str, str]]:
        """See `PinStore`."""
        found = self._beginning_with(beginning)
        if not found:
            await self._look()
            found = self._beginning_with(beginning)
        return found

    def _beginning_with(self, text: str) -> Mapping[str, Mapping[str, str]]:
        return {each: details for each, details in self._table.revisions.items() if each.startswith(text)}

    async def _look(self) -> None:
        """Take what another process has written to the file since, if it has."""
        self._looked_at = time.monotonic()
        # Each pull from a folder asks. It takes microseconds, and the way to a thread a hundred of them.
        if self._file_version() in (None, self._version):
            return
        async with self._turn:
            version, table = await asyncio.to_thread(self._load_unless, self._version)
            if table is not None:
                self._version = version
                self._table = self._changed(table, _Change())
                self._written = {each: pin.resolved for each, pin in table.pins.items()}

    async def _change(self, change: _Change) -> None:
        """Make a change, here and in the file; if that can't be written, here only."""
        async with self._turn:
            try:
                self._table = await asyncio.to_thread(self._change_file, change)
                self._written = {each: pin.resolved for each, pin in self._table.pins.items()}
            except StorageError as error:
                log.warning("pins can't be kept", file=str(self._file), reason=str(error))
                self._table = self._changed(self._table, change)
        for gone in self._used.keys() - self._table.pins.keys():
            self._used.pop(gone)

    def _change_file(self, change: _Change) -> _Table:
        with storage_errors(self._file.parent):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Another process may have written since.
            with exclusive(self._file.with_name(f"{self._file.name}.lock"), make=True):
                changed = self._changed(self._load(), change)
                durably_replace(self._file, msgspec.json.format(msgspec.json.encode(changed), indent=1))
        return changed

    def _changed(self, table: _Table, change: _Change) -> _Table:
        """Return a table with a change, and with what is known here and has not been written."""
        pins = dict(table.pins)
        for each, known in list(self._table.pins.items()):
            if each in pins and pins[each].resolved < known.resolved:
                pins[each] = known
        for reference, pin in change.pins.items():
            pins.pop(reference, None)
            if pin is not None:
                pins[reference] = pin
        for each, used in list(self._used.items()):
            if each in pins:
                pins[each] = msgspec.structs.replace(pins[each], used=max(used, pins[each].used))
        by_worth = sorted(pins, key=lambda each: (each not in change.pins, -pins[each].used, each))
        kept = by_worth[: self._most_pins]
        revisions = dict(table.revisions)
        for revision, details in change.revisions.items():
            revisions.pop(revision, None)
            revisions[revision] = dict(details)
        # What is pinned is remembered, however many other revisions came since.
        needed = {pins[each].revision for each in kept}
        others = [each for each in revisions if each not in needed]
        for each in others[: max(0, len(revisions) - self._most_revisions)]:
            del revisions[each]
        return _Table({each: pins[each] for each in sorted(kept)}, revisions)

    def _load_unless(self, known: tuple[int, int] | None) -> tuple[tuple[int, int] | None, _Table | None]:
        """Return the file's version and content; no content if it has none, or the version is known."""
        version = self._file_version()
        return version, None if version in (None, known) else self._load()

    def _file_version(self) -> tuple[int, int] | None:
        """Return what differs after each change of the file; None if there is none."""
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _load(self) -> _Table:
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return _Table()
        except OSError as error:
            log.warning("pins can't be read", file=str(self._file), reason=str(error))
            return _Table()
        try:
            return msgspec.json.decode(content, type=_Table)
        except msgspec.DecodeError as error:
            aside = self._file.with_name(f"{self._file.name}.damaged")
            log.warning("pins are damaged", file=str(self._file), moved_to=str(aside), reason=str(error))
            with suppress(OSError):
                self._file.rename(aside)
            return _Table()
