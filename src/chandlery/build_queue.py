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
from dataclasses import dataclass, field
from enum import StrEnum
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
    answered without trying again.
    """

    running: int = 4
    queued: int = 100
    grace: float = 300.0
    failure_memory: float = 10.0


@dataclass(eq=False, slots=True)
class Build:
    """One build; `timeline` has each step that began, with the seconds since the build was asked for."""

    key: str
    image: str
    client: str
    log_file: Path
    id: str
    asked_at: float  # seconds since the epoch
    state: BuildState = BuildState.QUEUED
    timeline: list[tuple[str, float]] = field(default_factory=list)
    error: ChandleryError | None = None
    waiters: int = 0
    _began: float = field(default_factory=time.monotonic)

    def step(self, name: str) -> None:
        """Note in the timeline that a step begins."""
        self.timeline.append((name, round(time.monotonic() - self._began, 3)))

    @property
    def seconds(self) -> float:
        """How long ago the build was asked for."""
        return time.monotonic() - self._began


Work = Callable[[Build], Awaitable[BuiltImage]]


@dataclass(eq=False, slots=True)
class _Entry:
    build: Build
    work: Work
    outcome: "asyncio.Future[BuiltImage]"
    task: "asyncio.Task[None] | None" = None
    abandoned: asyncio.TimerHandle | None = None


class BuildQueue:
    """Runs builds; enter it to start, leave it to stop what still runs. `logs` is a folder for their logs."""

    def __init__(self, limits: QueueLimits, logs: Path) -> None:
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
        self._stopping = True
        entries = list(self._entries.values())
        for entry in entries:
            self._cancel(entry)
        await asyncio.gather(*(entry.task for entry in entries if entry.task), return_exceptions=True)

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

    def position(self, build: Build) -> int:
        """Tell how many builds start before this one and it, in the order of turns; 0 when it has started."""
        turns = (each.build for each in self._turns())
        return next((number for number, each in enumerate(turns, 1) if each is build), 0)

    def _submit(self, key: str, image: str, client: str, work: Work) -> _Entry:
        until, error = self._failures.get(key, (0.0, None))
        if error is not None and until > time.monotonic():
            raise error.with_traceback(None)
        if sum(map(len, self._waiting.values())) >= self._limits.queued:
            raise TooManyBuildsError(image, self._limits.queued)
        build_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(4)}"
        build = Build(key, image, client, self._logs / f"{build_id}.log", build_id, time.time())
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
            entry.task = asyncio.create_task(self._run(entry), name=f"build {entry.build.id}")

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
            entry.outcome.set_exception(outcome)
            # Whoever waits hears of it; when nobody does, nobody needs to.
            entry.outcome.exception()
        else:
            entry.outcome.set_result(outcome)

    def _remember_failure(self, build: Build, error: Exception) -> None:
        # A full disk is mended in another place than the build.
        if not isinstance(error, ChandleryError) or isinstance(error, StorageError):
            return
        build.error = error
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
            entry.task.cancel()
            return
        queue = self._waiting[entry.build.client]
        queue.remove(entry)
        if not queue:
            del self._waiting[entry.build.client]
        self._end(entry, BuildState.CANCELLED, BuildStoppedError(entry.build.image, entry.build.id))
