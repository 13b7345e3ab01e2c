"""Builds as things of their own: an id, a state, a place in the queue, a log, a timeline.

A build belongs to the application, not to a request. There is one per key, however many wait for it; it is
cancelled when nobody has waited for a while. A limited number runs at once, and those that wait take turns by
client, so that one that asks for a hundred images delays another by one build, not by a hundred. A build
that failed is remembered for a moment, because clients ask more than once for what they can't have.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

import structlog

from chandlery.errors import (
    BuildPendingError,
    BuildStoppedError,
    ChandleryError,
    StorageError,
    TooManyBuildsError,
)
from chandlery.oci import BuiltImage

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Builds that have ended and can still be looked at, and logs that are kept.
_REMEMBERED = 200


# Builds that a server causes itself: each of these takes turns as if it were one client, without its limits.
SELF_REPAIR = "self-repair"
TAKEN_OVER = "taken over"
_OWN = frozenset({SELF_REPAIR, TAKEN_OVER})


class BuildState(StrEnum):
    """What a build is doing, or how it ended."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many builds run and wait; times are in seconds.

    `grace` is how long a build goes on that nobody waits for, `failure_memory` for how long a failed one is
    answered without trying again. `admit` is called with the client of each new build, and raises if that may
    not have another.
    """

    running: int = 4
    queued: int = 100
    grace: float = 300.0
    failure_memory: float = 10.0
    admit: Callable[[str], None] = lambda _: None


@dataclass(eq=False, slots=True)
class Build:
    """One build; `timeline` has each step that began, with the seconds since the build was asked for.

    `context` is that of the request that asked for it first: what the build logs has that request's id.
    """

    key: str
    image: str
    client: str
    log_file: Path
    id: str
    asked_at: float  # seconds since the epoch
    state: BuildState = BuildState.QUEUED
    timeline: list[tuple[str, float]] = field(default_factory=list)
    error: Exception | None = None
    waiters: int = 0
    context: Context = field(default_factory=copy_context, repr=False)
    _began: float = field(default_factory=time.monotonic)

    def step(self, name: str) -> None:
        """Note in the timeline that a step begins."""
        self.timeline.append((name, round(time.monotonic() - self._began, 3)))

    @property
    def has_ended(self) -> bool:
        """Tell whether nothing more will happen in it."""
        return self.state not in (BuildState.QUEUED, BuildState.RUNNING)

    @property
    def seconds(self) -> float:
        """How long it has taken since it was asked for, so far or to its end."""
        return self.timeline[-1][1] if self.has_ended else time.monotonic() - self._began

    @property
    def steps(self) -> list[tuple[str, float, float]]:
        """Give each step, its begin and its end, as in the timeline; before the first comes `queued`."""
        begun = [(BuildState.QUEUED.value, 0.0), *self.timeline]
        if not self.has_ended:
            begun.append(("", self.seconds))
        return [(name, begin, end) for (name, begin), (_, end) in pairwise(begun)]


Work = Callable[[Build], Awaitable[BuiltImage]]
Observer = Callable[[Build], None]


@dataclass(eq=False, slots=True)
class _Entry:
    build: Build
    work: Work
    outcome: "asyncio.Future[BuiltImage]"
    task: "asyncio.Task[None] | None" = None
    abandoned: asyncio.TimerHandle | None = None


class BuildQueue:
    """Runs builds; enter it to start, leave it to stop what still runs.

    `logs` is a folder for their logs; `observers` are told of every build that has ended.
    """

    def __init__(self, limits: QueueLimits, logs: Path) -> None:
        self.observers: list[Observer] = []
        self._limits = limits
        self._logs = logs
        self._entries: dict[str, _Entry] = {}  # by key: queued and running
        self._waiting: OrderedDict[str, deque[_Entry]] = OrderedDict()  # by client, the next one first
        self._running = 0
        self._stopping = False
        self._failures: dict[str, tuple[float, ChandleryError]] = {}
        self._ended: deque[Build] = deque(maxlen=_REMEMBERED)

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        by_age = sorted(self._logs.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in by_age[_REMEMBERED:]:
            old.unlink(missing_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        running = [entry.task for entry in self._entries.values() if entry.task]
        self.stop()
        await asyncio.gather(*running, return_exceptions=True)

    @property
    def stopping(self) -> bool:
        """Tell whether builds end because the server does."""
        return self._stopping

    def stop(self) -> None:
        """Cancel all builds and take no more: whoever waits, or asks now, gets `BuildStoppedError`."""
        self._stopping = True
        for entry in list(self._entries.values()):
            self._cancel(entry)

    async def wait(
        self, key: str, image: str, client: str, work: Work, timeout: float | None = None
    ) -> BuiltImage:
        """Give what `work` makes for a key, joining the build of that key if there is one.

        `image` and `client` are for people and for fairness. Raises what the build raises,
        `TooManyBuildsError` if the queue is full, and after `timeout` seconds `BuildPendingError`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            entry = self._entries.get(key) or self._submit(key, image, client, work)
            with self._waits(entry):
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                await asyncio.wait([entry.outcome], timeout=left)
            if not entry.outcome.done():
                raise BuildPendingError(image, entry.build.id, self.position(entry.build))
            # One that joined a build in the moment in which it was given up starts it anew.
            if entry.build.state is not BuildState.CANCELLED or self._stopping:
                return entry.outcome.result()

    def builds(self) -> list[Build]:
        """Give all builds that are known, the newest first."""
        current = [entry.build for entry in self._entries.values()]
        return sorted([*current, *self._ended], key=lambda build: build.asked_at, reverse=True)

    def find(self, build_id: str) -> Build | None:
        """Give the build with this id, if it is known."""
        return next((build for build in self.builds() if build.id == build_id), None)

    def log_file(self, build_id: str) -> Path:
        """Give where the log of a build is; `build_id` is trusted to be one."""
        return self._logs / f"{build_id}.log"

    @property
    def queued(self) -> int:
        """How many builds wait for their turn."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """How many builds run."""
        return self._running

    def position(self, build: Build) -> int:
        """Tell how many builds start before this one and it, in the order of turns; 0 when it has started."""
        turns = (each.build for each in self._turns())
        return next((number for number, each in enumerate(turns, 1) if each is build), 0)

    def _submit(self, key: str, image: str, client: str, work: Work) -> _Entry:
        if self._stopping:
            raise BuildStoppedError(image, "none")
        until, error = self._failures.get(key, (0.0, None))
        if error is not None and until > time.monotonic():
            raise error.with_traceback(None)
        if self.queued >= self._limits.queued:
            raise TooManyBuildsError(image, self._limits.queued)
        if client not in _OWN:
            self._limits.admit(client)
        build_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(4)}"
        build = Build(key, image, client, self.log_file(build_id), build_id, time.time())
        entry = _Entry(build, work, asyncio.get_running_loop().create_future())
        self._entries[key] = entry
        self._waiting.setdefault(client, deque()).append(entry)
        log.info("build queued", build=build_id, image=image, client=client)
        self._start_next()
        return entry

    def _turns(self) -> Iterator[_Entry]:
        """Give what waits, in the order in which it will start: one of each client, then again."""
        queues = [list(queue) for queue in self._waiting.values()]
        for round_number in range(max(map(len, queues), default=0)):
            for queue in queues:
                if round_number < len(queue):
                    yield queue[round_number]

    def _start_next(self) -> None:
        while self._running < self._limits.running and self._waiting:
            client, queue = self._waiting.popitem(last=False)
            entry = queue.popleft()
            if queue:
                self._waiting[client] = queue  # at the end: the others' turn comes first
            self._running += 1
            entry.build.state = BuildState.RUNNING
            # Not in the context of whatever build has just ended.
            entry.task = asyncio.create_task(
                self._run(entry), name=f"build {entry.build.id}", context=entry.build.context
            )

    async def _run(self, entry: _Entry) -> None:
        build = entry.build
        try:
            image = await entry.work(build)
        except asyncio.CancelledError:
            self._end(entry, BuildState.CANCELLED, BuildStoppedError(build.image, build.id))
            raise
        except Exception as error:
            self._end(entry, BuildState.FAILED, error)
            self._remember_failure(build, error)
            log.warning("build failed", build=build.id, image=build.image, error=str(error))
        else:
            self._end(entry, BuildState.FINISHED, image)
        finally:
            self._running -= 1
            if not self._stopping:
                self._start_next()

    def _end(self, entry: _Entry, state: BuildState, outcome: BuiltImage | Exception) -> None:
        entry.build.state = state
        entry.build.step(state)
        if entry.abandoned is not None:
            entry.abandoned.cancel()
        del self._entries[entry.build.key]
        self._ended.append(entry.build)
        if isinstance(outcome, Exception):
            entry.build.error = outcome
            if isinstance(outcome, ChandleryError):
                outcome.build = entry.build.id
            entry.outcome.set_exception(outcome)
            # Whoever waits hears of it; when nobody does, nobody needs to.
            entry.outcome.exception()
        else:
            entry.outcome.set_result(outcome)
        for observe in self.observers:
            observe(entry.build)

    def _remember_failure(self, build: Build, error: Exception) -> None:
        # A full disk is mended in another place than the build.
        if not isinstance(error, ChandleryError) or isinstance(error, StorageError):
            return
        now = time.monotonic()
        self._failures = {key: failure for key, failure in self._failures.items() if failure[0] > now}
        self._failures[build.key] = (now + self._limits.failure_memory, error)

    @contextmanager
    def _waits(self, entry: _Entry) -> Iterator[None]:
        """Count who waits; the last one to leave starts the time after which a build is cancelled."""
        if entry.abandoned is not None:
            entry.abandoned.cancel()
            entry.abandoned = None
        entry.build.waiters += 1
        try:
            yield
        finally:
            entry.build.waiters -= 1
            if entry.build.waiters == 0 and not entry.outcome.done():
                loop = asyncio.get_running_loop()
                entry.abandoned = loop.call_later(self._limits.grace, self._abandon, entry)

    def _abandon(self, entry: _Entry) -> None:
        log.info("build cancelled: nobody waits for it", build=entry.build.id, image=entry.build.image)
        self._cancel(entry)

    def _cancel(self, entry: _Entry) -> None:
        if entry.task is not None:
            # A second time would interrupt what the first one has begun: stopping Nix and its builders.
            if not entry.task.cancelling():
                entry.task.cancel()
            return
        queue = self._waiting[entry.build.client]
        queue.remove(entry)
        if not queue:
            del self._waiting[entry.build.client]
        self._end(entry, BuildState.CANCELLED, BuildStoppedError(entry.build.image, entry.build.id))
