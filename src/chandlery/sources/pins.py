"""What the references of a moving source were resolved to, durably: `main` is 4f0d3a9..., as of noon.

A pin that is younger than its lifetime is used without asking anybody. In the background those are renewed
that were used lately, so that requests seldom wait. One that expired all the same is resolved anew; if that
fails, or takes longer than a request should wait, the last good one is served and says so (`Pin.stale`). A
failure is remembered for a moment, so a dead upstream doesn't delay every pull.

"There is no such reference" is an answer, other than silence: the pin goes, and who asks is told. A branch
that was deleted, perhaps because what it held should run nowhere, would otherwise be served for ever. What it
was pinned to keeps the tag of its revision.

References come from clients. Those that upstream doesn't have are never written down, what is remembered of
them is bounded (`MissingReferences`), and a few resolutions run at once.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import structlog

from chandlery.errors import (
    ChandleryError,
    ReferenceNotFoundError,
    SourceUnavailableError,
    StorageError,
    TooManyReferencesError,
)
from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.durable import durably_replace
from chandlery.machine.locks import exclusive
from chandlery.sources.negative_cache import MissingReferences, NegativeCache

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# What is remembered at most, of each source.
_MOST_PINS = 256
_MOST_REVISIONS = 1024

_RESOLUTIONS_AT_ONCE = 4
_RESOLUTIONS_WAITING = 64  # of references that have no pin

# A pin that was used within this many seconds, or lifetimes, is renewed in the background,
_RECENT, _RECENT_LIFETIMES = 86400.0, 3.0
# and this part of its age at which it has to be is over.
_RENEWAL = 0.75

# A pin that is found to be as it was is written again after so many seconds.
_WRITE_INTERVAL = 60.0

# So many seconds after another process has renewed a pin this one has it, too.
_READ_INTERVAL = 1.0

_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class Resolved:
    """A revision, and what else has to be known to get it, such as a flake's lock; it is kept with it.

    `as_of` is when upstream said so, in seconds since 1970, if it wasn't asked just now.
    """

    revision: str
    details: Mapping[str, str] = field(default_factory=dict)
    as_of: float | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """What a reference means; `resolved` is when that was true, in seconds since 1970.

    `stale` says since when and why nothing newer is known; mostly it is empty.
    """

    revision: str
    resolved: float
    details: Mapping[str, str] = field(default_factory=dict)
    stale: str = ""


@dataclass(frozen=True, slots=True)
class PinLimits:
    """Seconds for which a pin lives, a request waits if there is a last good pin, a failure is remembered."""

    lifetime: float = 3600.0
    patience: float = 3.0
    back_off: float = 30.0


class _StoredPin(msgspec.Struct):
    revision: str
    resolved: float
    used: float
    details: dict[str, str] = {}


class _Stored(msgspec.Struct):
    """The file: pins by reference, and the details of every revision, the one pinned last at the end."""

    pins: dict[str, _StoredPin] = {}
    revisions: dict[str, dict[str, str]] = {}


@dataclass(frozen=True, slots=True)
class _Attempt:
    began: float
    task: "asyncio.Task[Pin]"


class Pins:
    """The pins of one source, in a file; `resolve` asks upstream, and sees that the revision can be had.

    It raises `ReferenceNotFoundError` if upstream says that there is no such reference, and another
    `ChandleryError` if the reference can't be resolved now. Processes may share the file.
    """

    def __init__(
        self,
        file: Path,
        source: str,
        resolve: Callable[[str], Awaitable[Resolved]],
        limits: PinLimits | None = None,
        *,
        missing: MissingReferences | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = file
        self._source = source
        self._resolve = resolve
        self._limits = limits or PinLimits()
        self._missing = missing
        self._clock = clock
        self._attempts: dict[str, _Attempt] = {}
        self._failures = NegativeCache(self._limits.back_off, clock=clock)
        self._stale_since: dict[str, float] = {}
        self._used: dict[str, float] = {}
        self._written: dict[str, float] = {}
        self._turns = asyncio.Semaphore(_RESOLUTIONS_AT_ONCE)
        self._version = self._version_of_file()
        self._read_at = time.monotonic()
        self._stored = self._load()

    async def get(self, reference: str) -> Pin:
        """Give what a reference means.

        Raises `ReferenceNotFoundError`; and without a last good pin whatever else kept `resolve` from it.
        """
        asked = self._clock()
        if time.monotonic() - self._read_at >= _READ_INTERVAL:
            self._read_again()
        while True:
            pin = self._pin(reference)
            now = self._clock()
            if pin is not None:
                self._used[reference] = now
                # The clock may have been set back since.
                if asked - self._limits.lifetime <= pin.resolved <= now:
                    return pin
            if self._read_again():
                continue
            attempt = self._attempts.get(reference)
            failure = None if attempt else self._failures.get(reference)
            if failure is not None:
                if pin is None:
                    raise failure
                return self._serve_stale(reference, pin, _reason(failure))
            attempt = attempt or self._begin(reference, pin)
            patience = None if pin is None else max(0.0, self._limits.patience - (now - attempt.began))
            done, _ = await asyncio.wait({attempt.task}, timeout=patience)
            if pin is not None and not done:
                return self._serve_stale(
                    reference, pin, f"it has not answered within {self._limits.patience:g} s"
                )
            if attempt.task.cancelled():
                raise SourceUnavailableError(self._source, "the server is being stopped")
            try:
                resolved = attempt.task.result()
            except ReferenceNotFoundError:
                raise
            except ChandleryError as error:
                if pin is None:
                    raise
                return self._serve_stale(reference, pin, _reason(error))
            # One that began before somebody asked may be of before, which counts with a very short lifetime.
            if attempt.began >= asked - self._limits.lifetime:
                return resolved

    def last(self, reference: str) -> Pin | None:
        """Give the last good pin of a reference, however old it is."""
        return self._pin(reference)

    def revision(self, beginning: str) -> str | None:
        """Give the revision that begins so, of those that were pinned once; None for none, or for several."""
        found = self._beginning_with(beginning)
        if not found and self._read_again():
            found = self._beginning_with(beginning)
        return found[0] if len(found) == 1 else None

    def details(self, revision: str) -> Mapping[str, str] | None:
        """Give the details of a revision that was pinned once, or None if it is not remembered."""
        if revision not in self._stored.revisions:
            self._read_again()
        return self._stored.revisions.get(revision)

    async def note(self, resolved: Resolved) -> None:
        """Remember a revision that came by no reference, such as one that a client named itself."""
        if resolved.revision not in self._stored.revisions:
            await self._change(None, None, resolved)

    async def refresh(self, max_age: float, always: Sequence[str] = ()) -> None:
        """Renew what is about to be `max_age` seconds old: the references of `always`, and those used lately.

        Raises what went wrong with one of `always` that has no pin.
        """
        now = self._clock()
        recent = now - max(_RECENT, _RECENT_LIFETIMES * self._limits.lifetime)
        tasks = []
        for reference in dict.fromkeys([*always, *self._stored.pins]):
            pin = self._pin(reference)
            if pin is not None and 0 <= now - pin.resolved < _RENEWAL * max_age:
                continue
            if reference in always or self._last_use(reference) >= recent:
                attempt = self._attempts.get(reference)
                if attempt is None and self._failures.get(reference) is None:
                    attempt = self._begin(reference, pin)
                if attempt is not None:
                    tasks.append(attempt.task)
        if tasks:
            await asyncio.wait(tasks)
        for reference in always:
            failure = self._failures.get(reference)
            if self._pin(reference) is None and failure is not None:
                raise failure

    async def close(self) -> None:
        """Stop what is being resolved."""
        tasks = [each.task for each in self._attempts.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _beginning_with(self, text: str) -> list[str]:
        return [each for each in self._stored.revisions if each.startswith(text)]

    def _pin(self, reference: str) -> Pin | None:
        stored = self._stored.pins.get(reference)
        if stored is None:
            return None
        return Pin(stored.revision, stored.resolved, stored.details)

    def _last_use(self, reference: str) -> float:
        return max(self._used.get(reference, 0.0), self._stored.pins[reference].used)

    def _begin(self, reference: str, pin: Pin | None) -> _Attempt:
        """Begin to resolve a reference."""
        now = self._clock()
        if pin is None:
            if self._missing is not None:
                self._missing.check(reference)
            if len(self._attempts) >= _RESOLUTIONS_WAITING:
                raise TooManyReferencesError(self._source)
        task = asyncio.create_task(self._attempt(reference, now))
        # Nobody may be left to ask how it ended.
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        attempt = self._attempts[reference] = _Attempt(now, task)
        return attempt

    async def _attempt(self, reference: str, began: float) -> Pin:
        try:
            async with self._turns:
                resolved = await self._resolve(reference)
            return await self._succeeded(reference, began, resolved)
        except ReferenceNotFoundError as error:
            await self._not_found(reference, error)
            raise
        except ChandleryError as error:
            self._failed(reference, error)
            raise
        finally:
            self._attempts.pop(reference, None)

    async def _succeeded(self, reference: str, began: float, resolved: Resolved) -> Pin:
        self._failures.forget(reference)
        if self._stale_since.pop(reference, None) is not None:
            log.info("the package source answers again", source=self._source, reference=reference)
        as_of = began if resolved.as_of is None else resolved.as_of
        used = max(self._used.get(reference, 0.0), began)
        new = _StoredPin(resolved.revision, as_of, used, dict(resolved.details))
        known = self._stored.pins.get(reference)
        written = self._written.get(reference, float("-inf"))
        if known is None or known.revision != new.revision or began - written >= _WRITE_INTERVAL:
            self._written[reference] = began
            await self._change(reference, new, resolved)
        else:
            self._stored.pins[reference] = new
        return Pin(resolved.revision, as_of, resolved.details)

    async def _not_found(self, reference: str, error: ReferenceNotFoundError) -> None:
        self._failures.forget(reference)
        self._stale_since.pop(reference, None)
        if self._missing is not None:
            self._missing.note(reference, error)
        if reference in self._stored.pins:
            log.warning("a reference is gone", source=self._source, reference=reference)
            await self._change(reference, None, None)

    def _failed(self, reference: str, error: ChandleryError) -> None:
        self._failures.note(reference, error)
        pin = self._pin(reference)
        if pin is not None:
            self._note_stale(reference, pin, _reason(error))

    def _serve_stale(self, reference: str, pin: Pin, reason: str) -> Pin:
        self._note_stale(reference, pin, reason)
        return replace(pin, stale=stale_since(pin.resolved, reason))

    def _note_stale(self, reference: str, pin: Pin, reason: str) -> None:
        if reference not in self._stale_since:
            self._stale_since[reference] = pin.resolved
            log.warning(
                "the package source can't be asked: its last good pin is served",
                source=self._source,
                reference=reference,
                revision=pin.revision,
                reason=reason,
            )

    async def _change(self, reference: str | None, pin: _StoredPin | None, resolved: Resolved | None) -> None:
        """Change one pin, or remove it, here and in the file; if that can't be written, here only."""
        try:
            self._stored = await asyncio.to_thread(self._change_file, reference, pin, resolved)
        except StorageError as error:
            log.warning("pins can't be kept", file=str(self._file), reason=str(error))
            self._stored = self._changed(self._stored, reference, pin, resolved)
        for noted in (self._used, self._written, self._stale_since):
            for gone in noted.keys() - self._stored.pins.keys():
                noted.pop(gone)

    def _change_file(
        self, reference: str | None, pin: _StoredPin | None, resolved: Resolved | None
    ) -> _Stored:
        with storage_errors(self._file.parent):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Another process may have written since.
            with exclusive(self._file.with_name(f"{self._file.name}.lock"), make=True):
                changed = self._changed(self._load(), reference, pin, resolved)
                durably_replace(self._file, msgspec.json.format(msgspec.json.encode(changed), indent=1))
        return changed

    def _read_again(self) -> bool:
        """Take what another process has written to the file since, if it has: it may have renewed a pin."""
        self._read_at = time.monotonic()
        version = self._version_of_file()
        if version is None or version == self._version:
            return False
        self._version = version
        self._stored = self._changed(self._load(), None, None, None)
        return True

    def _version_of_file(self) -> tuple[int, int] | None:
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _changed(
        self, stored: _Stored, reference: str | None, pin: _StoredPin | None, resolved: Resolved | None
    ) -> _Stored:
        pins = dict(stored.pins)
        # Not everything that is known here has been written.
        for each, known in list(self._stored.pins.items()):
            if each in pins and pins[each].resolved < known.resolved:
                pins[each] = known
        for each, used in list(self._used.items()):
            if each in pins:
                pins[each] = msgspec.structs.replace(pins[each], used=max(used, pins[each].used))
        if reference is not None:
            pins.pop(reference, None)
            if pin is not None:
                pins[reference] = pin
        kept = sorted(pins, key=lambda each: (each != reference, -pins[each].used, each))[:_MOST_PINS]
        revisions = dict(stored.revisions)
        if resolved is not None:
            revisions.pop(resolved.revision, None)
            revisions[resolved.revision] = dict(resolved.details)
        # What is pinned is remembered, however many other revisions came since.
        needed = {pins[each].revision for each in kept}
        others = [each for each in revisions if each not in needed]
        for each in others[: max(0, len(revisions) - _MOST_REVISIONS)]:
            del revisions[each]
        return _Stored({each: pins[each] for each in sorted(kept)}, revisions)

    def _load(self) -> _Stored:
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return _Stored()
        except OSError as error:
            log.warning("pins can't be read", file=str(self._file), reason=str(error))
            return _Stored()
        try:
            return msgspec.json.decode(content, type=_Stored)
        except msgspec.DecodeError as error:
            aside = self._file.with_name(f"{self._file.name}.damaged")
            log.warning("pins are damaged", file=str(self._file), moved_to=str(aside), reason=str(error))
            with suppress(OSError):
                self._file.rename(aside)
            return _Stored()


def stale_since(resolved: float, reason: str) -> str:
    """Say since when nothing newer is known, and why; on one line."""
    when = datetime.fromtimestamp(resolved, UTC)
    return f"as of {when:%Y-%m-%d %H:%M:%S} UTC, because the source could not be asked since: {reason}"


def _reason(error: ChandleryError) -> str:
    text = error.reason if isinstance(error, SourceUnavailableError) else str(error)
    return re.sub(r"\s+", " ", text)[:_LONGEST_REASON]
