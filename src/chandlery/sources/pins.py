"""What the references of a moving source were resolved to, durably: `main` is 4f0d3a9..., as of noon.

A reference is in one of a few states when somebody asks for it:

- fresh: its pin is younger than its lifetime, and used without asking anybody;
- being resolved: whoever asks waits for that, but not long if there is a last good pin;
- failed lately: a failure is remembered for a moment, so a dead upstream doesn't delay every pull;
- stale: there is no answer, or not in time; the last good pin is served and says so (`Pin.stale`);
- missing: there is no answer and no pin, or the answer is that there is no such reference.

In the background those pins are renewed that were used lately, so that requests seldom wait.

"There is no such reference" is an answer, other than silence: the pin goes, and the client is told. A branch
that was deleted, perhaps because what it held should run nowhere, would otherwise be served for ever. What it
was pinned to keeps the tag of its revision.

References come from clients. Those that upstream doesn't have are never written down, what is remembered of
them is bounded (`MissingReferences`), and a few resolutions run at once.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import structlog
from cachetools import LRUCache

from chandlery.errors import (
    ChandleryError,
    ReferenceNotFoundError,
    SourceUnavailableError,
    TooManyReferencesError,
)
from chandlery.sources.negative_cache import MissingReferences, NegativeCache
from chandlery.sources.pin_store import PinStore, StoredPin

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

_RESOLUTIONS_AT_ONCE = 4
_RESOLUTIONS_WAITING = 64  # of references that have no pin

# A pin that was used within this many seconds, or lifetimes, is renewed in the background,
_RECENT, _RECENT_LIFETIMES = 86400.0, 3.0
# and this part of its age at which it has to be is over.
_RENEWAL = 0.75

# References of which it is known that they are logged as stale.
_MOST_STALE = 1024
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


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A reference is being resolved, since `began`."""

    began: float
    task: "asyncio.Task[Pin]"


@dataclass(frozen=True, slots=True)
class _Fresh:
    pin: Pin


@dataclass(frozen=True, slots=True)
class _Stale:
    last: Pin
    reason: str


@dataclass(frozen=True, slots=True)
class _Missing:
    error: ChandleryError


@dataclass(frozen=True, slots=True)
class _Outdated:
    """It was resolved, by an attempt that began too long before somebody asked."""


class Pins:
    """The pins of one source; `resolve` asks upstream, and sees that the revision can be had.

    It raises `ReferenceNotFoundError` if upstream says that there is no such reference, and another
    `ChandleryError` if the reference can't be resolved now.
    """

    def __init__(
        self,
        store: PinStore,
        source: str,
        resolve: Callable[[str], Awaitable[Resolved]],
        limits: PinLimits | None = None,
        *,
        missing: MissingReferences | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._source = source
        self._resolve = resolve
        self._limits = limits or PinLimits()
        self._missing = missing
        self._clock = clock
        self._attempts: dict[str, _Attempt] = {}
        self._failures = NegativeCache(self._limits.back_off, clock=clock)
        self._told_stale: LRUCache[str, bool] = LRUCache(_MOST_STALE)
        self._turns = asyncio.Semaphore(_RESOLUTIONS_AT_ONCE)

    async def get(self, reference: str) -> Pin:
        """Return what a reference means.

        Raises `ReferenceNotFoundError`; and without a last good pin whatever else kept `resolve` from it.
        """
        asked = self._clock()
        while True:
            match await self._state(reference, asked):
                case _Fresh(pin):
                    return pin
                case _Stale(last, reason):
                    self._tell_stale(reference, last, reason)
                    return replace(last, stale=stale_since(last.resolved, reason))
                case _Missing(error):
                    raise error
                case _Outdated():
                    continue

    async def last(self, reference: str) -> Pin | None:
        """Return the last good pin of a reference, however old it is."""
        return _pin(await self._store.pin(reference))

    async def revision(self, beginning: str) -> str | None:
        """Return the revision that begins so, of those that were pinned once; None unless there is one."""
        found = [*await self._store.revisions(beginning)]
        return found[0] if len(found) == 1 else None

    async def details(self, revision: str) -> Mapping[str, str] | None:
        """Return the details of a revision that was pinned once, or None if it is not remembered."""
        return (await self._store.revisions(revision)).get(revision)

    async def note(self, resolved: Resolved) -> None:
        """Remember a revision that came by no reference, such as one that a client named itself."""
        if await self.details(resolved.revision) is None:
            await self._store.remember(resolved.revision, resolved.details)

    async def refresh(self, max_age: float, always: Sequence[str] = ()) -> None:
        """Renew what is about to be `max_age` seconds old: the references of `always`, and those used lately.

        Raises what went wrong with one of `always` that has no pin.
        """
        now = self._clock()
        pins = await self._store.pins()
        attempts: dict[str, asyncio.Task[Pin]] = {}
        for reference in dict.fromkeys([*always, *pins]):
            known = pins.get(reference)
            if known is not None and 0 <= now - known.resolved < _RENEWAL * max_age:
                continue
            if reference in always or self._was_used_lately(known):
                attempt = self._attempts.get(reference)
                if attempt is None and self._failures.get(reference) is None:
                    attempt = self._begin(reference, _pin(known))
                if attempt is not None:
                    attempts[reference] = attempt.task
        if attempts:
            await asyncio.wait(attempts.values())
        for reference in always:
            failure = self._failures.get(reference) or _failure(attempts.get(reference))
            if failure is not None and await self._store.pin(reference) is None:
                raise failure

    async def in_use(self, references: Sequence[str]) -> list[str]:
        """Return those of some references that have a pin and were used lately."""
        pins = await self._store.pins()
        return [each for each in references if self._was_used_lately(pins.get(each))]

    async def close(self) -> None:
        """Stop what is being resolved."""
        tasks = [each.task for each in self._attempts.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _was_used_lately(self, pin: StoredPin | None) -> bool:
        recent = self._clock() - max(_RECENT, _RECENT_LIFETIMES * self._limits.lifetime)
        return pin is not None and pin.used >= recent

    async def _state(self, reference: str, asked: float) -> _Fresh | _Stale | _Missing | _Outdated:
        """Return how a reference stands that somebody asked for, once it isn't being resolved any more."""
        last = await self._known(reference, asked)
        if last is not None and self._is_fresh(last, asked):
            return _Fresh(last)
        # From here until somebody waits, nothing else runs: so a reference is resolved once at a time.
        attempt = self._attempts.get(reference)
        if attempt is None:
            failed_lately = self._failures.get(reference)
            if failed_lately is not None:
                return _without_answer(last, failed_lately)
            attempt = self._begin(reference, last)
        return await self._resolving(attempt, last, asked)

    async def _known(self, reference: str, asked: float) -> Pin | None:
        """Return the pin of a reference, and note its use; unless it is fresh, what others have now."""
        pin = _pin(await self._store.pin(reference))
        if pin is None or not self._is_fresh(pin, asked):
            pin = _pin(await self._store.pin(reference, latest=True))
        if pin is not None:
            self._store.note_use(reference, self._clock())
        return pin

    def _is_fresh(self, pin: Pin, asked: float) -> bool:
        # The clock may have been set back since.
        return asked - self._limits.lifetime <= pin.resolved <= self._clock()

    async def _resolving(
        self, attempt: _Attempt, last: Pin | None, asked: float
    ) -> _Fresh | _Stale | _Missing | _Outdated:
        """Wait for an attempt, and not long if there is a last good pin."""
        waited = self._clock() - attempt.began
        patience = None if last is None else max(0.0, self._limits.patience - waited)
        await asyncio.wait({attempt.task}, timeout=patience)
        if last is not None and not attempt.task.done():
            return _Stale(last, f"it has not answered within {self._limits.patience:g} s")
        if attempt.task.cancelled():
            return _Missing(SourceUnavailableError(self._source, "the server is being stopped"))
        error = attempt.task.exception()
        if isinstance(error, ReferenceNotFoundError):
            return _Missing(error)
        if isinstance(error, ChandleryError):
            return _without_answer(last, error)
        # One that began before somebody asked may be of before, which counts with a very short lifetime.
        resolved = attempt.task.result()
        return _Fresh(resolved) if attempt.began >= asked - self._limits.lifetime else _Outdated()

    def _begin(self, reference: str, last: Pin | None) -> _Attempt:
        """Begin to resolve a reference. Without a pin it raises what is known of missing references."""
        if last is None:
            if self._missing is not None:
                self._missing.check(reference)
            if len(self._attempts) >= _RESOLUTIONS_WAITING:
                raise TooManyReferencesError(self._source)
        began = self._clock()
        task = asyncio.create_task(self._attempt(reference, began))
        # Nobody may be left to ask how it ended.
        task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        attempt = self._attempts[reference] = _Attempt(began, task)
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
            await self._failed(reference, error)
            raise
        finally:
            self._attempts.pop(reference, None)

    async def _succeeded(self, reference: str, began: float, resolved: Resolved) -> Pin:
        self._failures.forget(reference)
        if self._told_stale.pop(reference, False):
            log.info("the package source answers again", source=self._source, reference=reference)
        as_of = began if resolved.as_of is None else resolved.as_of
        known = await self._store.pin(reference)
        # To renew a pin in the background is no use of it.
        used = began if known is None else known.used
        await self._store.put(reference, StoredPin(resolved.revision, as_of, used, dict(resolved.details)))
        return Pin(resolved.revision, as_of, resolved.details)

    async def _not_found(self, reference: str, error: ReferenceNotFoundError) -> None:
        self._failures.forget(reference)
        self._told_stale.pop(reference, None)
        if self._missing is not None:
            self._missing.note(reference, error)
        if await self._store.pin(reference) is not None:
            log.warning("a reference is gone", source=self._source, reference=reference)
            await self._store.remove(reference)

    async def _failed(self, reference: str, error: ChandleryError) -> None:
        self._failures.note(reference, error)
        last = _pin(await self._store.pin(reference))
        if last is not None:
            self._tell_stale(reference, last, _reason(error))

    def _tell_stale(self, reference: str, last: Pin, reason: str) -> None:
        """Log that a last good pin has to be served, once."""
        if reference not in self._told_stale:
            self._told_stale[reference] = True
            log.warning(
                "the package source can't be asked: its last good pin is served",
                source=self._source,
                reference=reference,
                revision=last.revision,
                reason=reason,
            )


def stale_since(resolved: float, reason: str) -> str:
    """Return since when nothing newer is known, and why; on one line."""
    when = datetime.fromtimestamp(resolved, UTC)
    return f"as of {when:%Y-%m-%d %H:%M:%S} UTC, because the source could not be asked since: {reason}"


def _pin(stored: StoredPin | None) -> Pin | None:
    return None if stored is None else Pin(stored.revision, stored.resolved, stored.details)


def _failure(task: "asyncio.Task[Pin] | None") -> ChandleryError | None:
    """Return what kept upstream from an answer, if it didn't answer; however short that is remembered."""
    error = None if task is None or task.cancelled() else task.exception()
    return (
        error if isinstance(error, ChandleryError) and not isinstance(error, ReferenceNotFoundError) else None
    )


def _without_answer(last: Pin | None, error: ChandleryError) -> _Stale | _Missing:
    """Return the state of a reference about which upstream said nothing."""
    return _Missing(error) if last is None else _Stale(last, _reason(error))


def _reason(error: ChandleryError) -> str:
    text = error.reason if isinstance(error, SourceUnavailableError) else str(error)
    return re.sub(r"\s+", " ", text)[:_LONGEST_REASON]
