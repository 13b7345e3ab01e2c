"""Which builds run, and which wait for their turn; who waits for them; how they ended.

A build belongs to the application, not to a request. There is one per key, however many wait for it; it is
cancelled when nobody has waited for a while. A limited number runs at once, and those that wait take turns by
client, so that one that asks for a hundred images delays another by one build, not by a hundred. A build
that failed is remembered for a moment, because clients ask more than once for what they can't have.

All of this holds over the processes that share a folder, too, but for the order of turns, which each process
has for itself. What another process builds is awaited, without a turn; if that process dies, or gives the
build up, the build takes its turn here.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

import structlog

from chandlery.builds.build import Build, BuildState
from chandlery.builds.failures import FailedBuilds
from chandlery.builds.locks import BuildClaims
from chandlery.errors import (
    BuildPendingError,
    BuildStoppedError,
    ChandleryError,
    StorageError,
    TooManyBuildsError,
)
from chandlery.oci.documents import BuiltImage

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Builds that have ended and can still be looked at, and logs that are kept.
_REMEMBERED = 200

# Seconds between looks at what other processes build, while somebody waits here.
_POLL = 0.1

# Builds that a server causes itself: each of these takes turns as if it were one client, without its limits.
SELF_REPAIR = "self-repair"
TAKEN_OVER = "taken over"
_OWN = frozenset({SELF_REPAIR, TAKEN_OVER})


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


Work = Callable[[Build], Awaitable[BuiltImage]]
Look = Callable[[], Awaitable[BuiltImage | None]]
Observer = Callable[[Build], None]


@dataclass(eq=False, slots=True)
class _Entry:
    build: Build
    work: Work
    look: Look
    outcome: "asyncio.Future[BuiltImage]"
    task: "asyncio.Task[None] | None" = None
    abandoned: asyncio.TimerHandle | None = None
    elsewhere: str | None = None  # the id of the build that another process has of this key


async def _nothing() -> None:
    return None


class BuildQueue:
    """Runs builds; enter it to start, leave it to stop what still runs.

    `logs` is a folder for their logs, and for what processes that share it tell each other of builds;
    `observers` are told of every build that has ended.
    """

    def __init__(self, limits: QueueLimits, logs: Path) -> None:
        self.observers: list[Observer] = []
        self._limits = limits
        self._logs = logs
        self._entries: dict[str, _Entry] = {}  # by key: queued and running
        self._waiting: OrderedDict[str, deque[_Entry]] = OrderedDict()  # by client, the next one first
        self._running = 0
        self._stopping = False
        self._look_again: asyncio.TimerHandle | None = None
        self._failures = FailedBuilds(logs, limits.failure_memory)
        self.claims = BuildClaims(logs, limits.running)
        self._ended: deque[Build] = deque(maxlen=_REMEMBERED)

    async def __aenter__(self) -> Self:
        self.claims.open()
        self._failures.sweep()
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
        if self._look_again is not None:
            self._look_again.cancel()
        for entry in list(self._entries.values()):
            self._cancel(entry)

    async def wait(
        self,
        key: str,
        image: str,
        client: str,
        work: Work,
        timeout: float | None = None,
        look: Look = _nothing,
    ) -> BuiltImage:
        """Give what `work` makes for a key, joining the build of that key if there is one.

        `image` and `client` are for people and for fairness; `look` gives what another process may have made
        for the key meanwhile. Raises what the build raises, `TooManyBuildsError` if the queue is full, and
        after `timeout` seconds `BuildPendingError`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            entry = self._entries.get(key) or self._submit(key, image, client, work, look)
            with self._waits(entry):
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                await asyncio.wait([entry.outcome], timeout=left)
            if not entry.outcome.done():
                raise BuildPendingError(image, entry.elsewhere or entry.build.id, self.position(entry.build))
            # One that joined a build in the moment in which it was given up starts it anew.
            if entry.build.state is not BuildState.CANCELLED or self._stopping:
                return entry.outcome.result()

    def builds(self) -> list[Build]:
        """Give all builds of this process that are known, the newest first."""
        current = [entry.build for entry in self._entries.values() if entry.elsewhere is None]
        return sorted([*current, *self._ended], key=lambda build: build.asked_at, reverse=True)

    def find(self, build_id: str) -> Build | None:
        """Give the build with this id, if it is known."""
        return next((build for build in self.builds() if build.id == build_id), None)

    def log_file(self, build_id: str) -> Path:
        """Give where the log of a build is; `build_id` is trusted to be one."""
        return self._logs / f"{build_id}.log"

    @property
    def queued(self) -> int:
        """How many builds wait for their turn, of this process."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """How many builds run, of this process."""
        return self._running

    def position(self, build: Build) -> int:
        """Tell how many builds start before this one and it, in the order of turns; 0 when it has started."""
        turns = (each.build for each in self._turns())
        return next((number for number, each in enumerate(turns, 1) if each is build), 0)

    def _submit(self, key: str, image: str, client: str, work: Work, look: Look) -> _Entry:
        if self._stopping:
            raise BuildStoppedError(image, "none")
        failure = self._failures.recent(key)
        if failure is not None:
            raise failure
        elsewhere = self.claims.holder(key)
        if elsewhere is None:
            if self.queued >= self._limits.queued:
                raise TooManyBuildsError(image, self._limits.queued)
            if client not in _OWN:
                self._limits.admit(client)
        build_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(4)}"
        build = Build(key, image, client, self.log_file(build_id), build_id, time.time())
        entry = _Entry(build, work, look, asyncio.get_running_loop().create_future())
        self._entries[key] = entry
        if elsewhere is None:
            self._take_turns(entry)
        else:
            self._follow(entry, elsewhere)
        return entry

    def _take_turns(self, entry: _Entry) -> None:
        build = entry.build
        log.info("build queued", build=build.id, image=build.image, client=build.client)
        self._waiting.setdefault(build.client, deque()).append(entry)
        self._start_next()

    def _turns(self) -> Iterator[_Entry]:
        """Give what waits, in the order in which it will start: one of each client, then again."""
        queues = [list(queue) for queue in self._waiting.values()]
        for round_number in range(max(map(len, queues), default=0)):
            for queue in queues:
                if round_number < len(queue):
                    yield queue[round_number]

    def _start_next(self) -> None:
        """Start what has its turn, as far as may run at once, and await what other processes have begun."""
        all_taken = False
        for entry in list(self._turns()):
            elsewhere = self.claims.holder(entry.build.key)
            if elsewhere is not None:
                self._withdraw(entry)
                self._follow(entry, elsewhere)
            elif not all_taken:
                slot = self.claims.slot() if self._running < self._limits.running else None
                all_taken = slot is None
                if slot is not None:
                    self._try_to_start(entry, slot)
        if self._waiting and self._look_again is None and not self._stopping:
            self._look_again = asyncio.get_running_loop().call_later(_POLL, self._try_again)

    def _try_again(self) -> None:
        self._look_again = None
        self._start_next()

    def _withdraw(self, entry: _Entry) -> None:
        """Take an entry from those that wait."""
        queue = self._waiting[entry.build.client]
        queue.remove(entry)
        if not queue:
            del self._waiting[entry.build.client]

    def _try_to_start(self, entry: _Entry, slot: ExitStack) -> None:
        """Start a build, which has a slot and its key as long as it runs; not if another process is at it."""
        build = entry.build
        claim = self.claims.claim(build.key, build.id)
        if claim is None:
            slot.close()
            return
        slot.enter_context(claim)
        self._withdraw(entry)
        if build.client in self._waiting:
            self._waiting.move_to_end(build.client)  # the others' turn comes first
        self._running += 1
        build.state = BuildState.RUNNING
        # Not in the context of whatever build has just ended.
        entry.task = asyncio.create_task(
            self._run(entry, slot), name=f"build {build.id}", context=build.context
        )

    async def _run(self, entry: _Entry, held: ExitStack) -> None:
        build = entry.build
        try:
            with held:
                if not await self._is_settled(entry):
                    await self._build(entry)
        except asyncio.CancelledError:
            self._end(entry, BuildState.CANCELLED, BuildStoppedError(build.image, build.id))
            raise
        finally:
            self._running -= 1
            if not self._stopping:
                self._start_next()

    async def _build(self, entry: _Entry) -> None:
        try:
            image = await entry.work(entry.build)
        except Exception as error:
            self._fail(entry, error)
        else:
            self._end(entry, BuildState.FINISHED, image)

    def _fail(self, entry: _Entry, error: Exception) -> None:
        build = entry.build
        self._end(entry, BuildState.FAILED, error)
        # A full disk is mended in another place than the build.
        if isinstance(error, ChandleryError) and not isinstance(error, StorageError):
            self._failures.remember(build.key, error)
        log.warning("build failed", build=build.id, image=build.image, error=str(error))

    def _follow(self, entry: _Entry, elsewhere: str) -> None:
        log.info("another process builds it", build=elsewhere, image=entry.build.image)
        entry.elsewhere = elsewhere
        entry.task = asyncio.create_task(self._await_other(entry), context=entry.build.context)

    async def _await_other(self, entry: _Entry) -> None:
        """Wait for another process's build; if it comes to nothing, the build has its turn here."""
        build = entry.build
        try:
            while self.claims.holder(build.key) is not None:
                if build.waiters:
                    self.claims.wait_for(build.key)
                await asyncio.sleep(_POLL)
            if await self._is_settled(entry):
                return
        except asyncio.CancelledError:
            self._end(entry, BuildState.CANCELLED, BuildStoppedError(build.image, build.id))
            raise
        entry.elsewhere = entry.task = None
        self._take_turns(entry)

    async def _is_settled(self, entry: _Entry) -> bool:
        """End an entry that needs no build here, because another process had one meanwhile."""
        try:
            outcome = await entry.look() or self._failures.recent(entry.build.key)
        except Exception as error:
            self._fail(entry, error)
            return True
        if outcome is None:
            return False
        entry.elsewhere = entry.elsewhere or ""
        self._end(
            entry, BuildState.FAILED if isinstance(outcome, Exception) else BuildState.FINISHED, outcome
        )
        return True

    def _end(self, entry: _Entry, state: BuildState, outcome: BuiltImage | Exception) -> None:
        entry.build.state = state
        entry.build.step(state)
        if entry.abandoned is not None:
            entry.abandoned.cancel()
        del self._entries[entry.build.key]
        if isinstance(outcome, Exception):
            entry.build.error = outcome
            if isinstance(outcome, ChandleryError) and entry.elsewhere is None:
                outcome.build = entry.build.id
            entry.outcome.set_exception(outcome)
            # Whoever waits hears of it; when nobody does, nobody needs to.
            entry.outcome.exception()
        else:
            entry.outcome.set_result(outcome)
        if entry.elsewhere is not None:
            return
        self._ended.append(entry.build)
        for observe in self.observers:
            observe(entry.build)

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
        left = self._limits.grace - self.claims.waited_for(entry.build.key)
        if left > 0 and entry.build.state is BuildState.RUNNING:
            # Others wait for it where it can't be seen from here.
            entry.abandoned = asyncio.get_running_loop().call_later(left, self._abandon, entry)
            return
        log.info("build cancelled: nobody waits for it", build=entry.build.id, image=entry.build.image)
        self._cancel(entry)

    def _cancel(self, entry: _Entry) -> None:
        if entry.task is not None:
            # A second time would interrupt what the first one has begun: stopping Nix and its builders.
            if not entry.task.cancelling():
                entry.task.cancel()
            return
        self._withdraw(entry)
        self._end(entry, BuildState.CANCELLED, BuildStoppedError(entry.build.image, entry.build.id))
