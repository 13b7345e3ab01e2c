"""Which builds run, and which wait for their turn; who waits for them; how they ended.

A build belongs to the application, not to a request. There is one per key, however many wait for it; it is
cancelled when nobody has waited for a while, which is short as long as it has not begun. A build that failed
is remembered for a moment, because clients ask more than once for what they can't have.

A limited number runs at once, and a limited number waits; all of it is shared between clients:

- Those that wait take turns by client (`builds.turns`), so that one that asks for a hundred images delays
  another by one build, not by a hundred. A build that several wait for has the earliest of their turns.
- The last slots are reserved for clients that have no build running: no client's slow builds hold them all.
- When the queue is full, what nobody waits for gives way, and then the newest build of the client that has
  most, to one that has fewer.

All of this holds over the processes that share a folder, too, but for places and the order of turns, which
each process has for itself. What another process builds is followed, without a turn; if that process dies, or
gives the build up, the build takes its turn here.

What is in the queue goes through these states:

    WAITING    for its turn here               -> RUNNING, FOLLOWING, ENDED (cancelled)
    FOLLOWING  another process builds it       -> WAITING, ENDED
    RUNNING    here                            -> ENDED
    ENDED      with an image, or with an error
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Self

import structlog

from chandlery.access.rules import EVERYTHING, Permission
from chandlery.builds.build import Build, BuildState
from chandlery.builds.build_logs import BuildLogs
from chandlery.builds.failures import FailedBuilds
from chandlery.builds.locks import BuildSlot, FileBuildLocks
from chandlery.builds.recipe import Recipe
from chandlery.builds.turns import Turns
from chandlery.builds.unfinished import UnfinishedBuilds
from chandlery.errors import (
    BuildDisplacedError,
    BuildPendingError,
    BuildStoppedError,
    ChandleryError,
    PullDeniedError,
    StorageError,
    TooManyBuildsError,
)
from chandlery.machine.deadline import NO_DEADLINE, Deadline
from chandlery.oci.documents import BuiltImage

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

# Builds that have ended and can still be looked at, and logs that are kept; how many more there may be.
_REMEMBERED, _TRIM_AFTER = 200, 20

# Seconds between looks at what other processes build, while somebody waits here.
_POLL = 0.1

# Builds that a server causes itself: each of these takes turns as if it were one client, without its limits.
SELF_REPAIR = "self-repair"
TAKEN_OVER = "taken over"
_OWN = frozenset({SELF_REPAIR, TAKEN_OVER})


def admit_all(_: str) -> None:
    """Let every client have as many builds as it likes; see `QueueLimits`."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many builds run and wait; times are in seconds.

    `grace` is how long a build goes on that nobody waits for, `failure_memory` for how long a failed one is
    answered without trying again. `admit` is called with the client of each new build, and raises if that may
    not have another. Of those that run, `reserved` are for clients that have none running.

    A build that has not begun and that nobody waits for is kept for `queued_grace`, in which clients come
    again that were answered 429; in a full queue it is safe for `absence` alone, which is longer than a
    client takes to come again when it is sent on to itself.
    """

    running: int = 4
    queued: int = 100
    grace: float = 300.0
    failure_memory: float = 10.0
    admit: Callable[[str], None] = admit_all
    reserved: int = 0
    queued_grace: float = 60.0
    absence: float = 10.0


# What carries out a build, and what returns the image of a key if it is known.
Work = Callable[[Build], Awaitable[BuiltImage]]
Known = Callable[[str], Awaitable[BuiltImage | None]]
Observer = Callable[[Build], None]


class _State(Enum):
    """See above."""

    WAITING = "waiting"
    FOLLOWING = "following"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class _Entry:
    """A build in the queue; `owner` is the id of the build of its key that another process has or had.

    `client` is the one in whose turn it was begun; `waiting` says how many requests of each client wait, and
    since the time `left_at` (of `time.monotonic`) there are none.
    """

    build: Build
    outcome: "asyncio.Future[BuiltImage]"
    state: _State
    owner: str | None = None
    client: str = ""
    waiting: Counter[str] = field(default_factory=Counter)
    left_at: float = math.inf
    task: "asyncio.Task[None] | None" = None
    abandoned: "asyncio.Task[None] | None" = None

    @property
    def is_own(self) -> bool:
        """Return whether the server itself wants it."""
        return self.build.client in _OWN


class BuildQueue:
    """Runs builds by `build`; enter it to start, leave it to stop what still runs.

    `known` returns the image of a key that another process may have made meanwhile. `folder` is for the logs
    of builds, and for what processes that share it tell each other of builds; `observers` are told of every
    build that has ended.
    """

    def __init__(self, limits: QueueLimits, folder: Path, *, build: Work, known: Known) -> None:
        self.observers: list[Observer] = []
        self.locks = FileBuildLocks(folder, limits.running, limits.reserved)
        self._build = build
        self._known = known
        self._limits = limits
        self._logs = BuildLogs(folder, _REMEMBERED)
        self._ended_since_trim = 0
        self._entries: dict[str, _Entry] = {}  # by key: all that has not ended
        self._turns = Turns[_Entry]()  # of all that is WAITING
        self._running = 0
        self._stopping = False
        self._failures = FailedBuilds(folder, limits.failure_memory)
        self._unfinished = UnfinishedBuilds(folder, self.locks)
        self._ended: deque[Build] = deque(maxlen=_REMEMBERED)
        self._changed = asyncio.Event()
        self._scheduler: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.locks.open()
        self._failures.sweep()
        await self._logs.trim()
        self._scheduler = asyncio.create_task(self._schedule(), name="build queue")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entries = self._entries.values()
        tasks = [task for entry in entries for task in (entry.task, entry.abandoned) if task]
        self.stop()
        if self._scheduler:
            tasks.append(self._scheduler)
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def stopping(self) -> bool:
        """Return whether builds end because the server does."""
        return self._stopping

    def stop(self) -> None:
        """Cancel all builds and take no more: whoever waits, or asks now, gets `BuildStoppedError`."""
        self._stopping = True
        if self._scheduler is not None:
            self._scheduler.cancel()
        for entry in list(self._entries.values()):
            self._cancel(entry)

    async def wait(
        self,
        recipe: Recipe,
        client: str = "",
        deadline: Deadline = NO_DEADLINE,
        permission: Permission = EVERYTHING,
    ) -> BuiltImage:
        """Return the image of a recipe, joining the build of its key if there is one.

        `client` is for fairness, its `permission` for the build. Raises what the build raises,
        `TooManyBuildsError` if the queue is full, `BuildDisplacedError` if the build gives way in it, and
        `BuildPendingError` at the deadline: then the build goes on.
        """
        key = recipe.key
        while True:
            entry = self._entries.get(key)
            if entry is None:
                owner = await self.locks.owner(key)
                entry = self._entries.get(key) or self._submit(recipe, client, owner)
            entry.build.permissions.add(permission)
            with self._waits(entry, client):
                await asyncio.wait([entry.outcome], timeout=deadline.left)
            if not entry.outcome.done():
                build_id = entry.owner or entry.build.id
                raise BuildPendingError(recipe.title, build_id, self.position(entry.build))
            # One that joined a build in the moment in which it was given up starts it anew.
            if not isinstance(entry.outcome.exception(), BuildStoppedError) or self._stopping:
                return entry.outcome.result()

    async def take_over(self) -> list[Recipe]:
        """Return the recipes of builds that dead processes didn't end; each is returned once."""
        return await self._unfinished.take_over()

    def builds(self) -> list[Build]:
        """Return all builds of this process that are known, the newest first."""
        current = [entry.build for entry in self._entries.values() if entry.owner is None]
        return sorted([*current, *self._ended], key=lambda build: build.asked_at, reverse=True)

    def find(self, build_id: str) -> Build | None:
        """Return the build with this id, if it is known."""
        return next((build for build in self.builds() if build.id == build_id), None)

    def log_file(self, build_id: str) -> Path:
        """Return where the log of a build is; `build_id` is trusted to be one."""
        return self._logs.file(build_id)

    @property
    def queued(self) -> int:
        """How many builds wait for their turn, of this process."""
        return len(self._turns)

    @property
    def running(self) -> int:
        """How many builds run, of this process."""
        return self._running

    def position(self, build: Build) -> int:
        """Return how many builds start before this one and it, in the order of turns; 0 when it runs."""
        turns = enumerate(self._turns, 1)
        return next((number for number, each in turns if each.build is build), 0)

    def _submit(self, recipe: Recipe, client: str, owner: str | None) -> _Entry:
        """Take a build of a key whose lock has an owner, or none."""
        if self._stopping:
            raise BuildStoppedError(recipe.title, "none")
        failure = self._failures.recent(recipe.key)
        if failure is not None:
            raise failure
        if owner is None:
            displaced = self._displaced_by(client) if self._is_full else None
            if self._is_full and displaced is None:
                raise TooManyBuildsError(recipe.title, self._limits.queued)
            if client not in _OWN:
                self._limits.admit(client)
            if displaced is not None:
                self._displace(displaced)
        build_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(4)}"
        build = Build(recipe, client, self.log_file(build_id), build_id, time.time())
        entry = _Entry(build, asyncio.get_running_loop().create_future(), _State.WAITING)
        self._entries[build.key] = entry
        if owner is None:
            self._take_turns(entry)
        else:
            self._follow(entry, owner)
        return entry

    # A full queue.

    @property
    def _is_full(self) -> bool:
        # Those that will start at once don't have to wait.
        return self.queued - (self._limits.running - self._running) >= self._limits.queued

    def _displaced_by(self, client: str) -> _Entry | None:
        """Return what gives way to a build of a client; nothing, if each has its share."""
        absent_since = time.monotonic() - self._limits.absence
        absent = [each for each in self._turns if each.left_at <= absent_since and not each.is_own]
        if absent:
            return min(absent, key=lambda each: each.left_at)
        running = Counter(each.client for each in self._entries.values() if each.state is _State.RUNNING)
        return self._turns.gives_way_to(client, running, exempt=_OWN)

    def _displace(self, entry: _Entry) -> None:
        build = entry.build
        log.info("build displaced: the queue is full", build=build.id, image=build.image, client=build.client)
        self._turns.remove(entry)
        self._end(entry, BuildState.CANCELLED, BuildDisplacedError(build.image, self._limits.queued))

    # Taking turns.

    def _take_turns(self, entry: _Entry) -> None:
        build = entry.build
        log.info("build queued", build=build.id, image=build.image, client=build.client)
        entry.state, entry.owner, entry.task = _State.WAITING, None, None
        self._turns.join(build.client, entry)
        self._share_turns(entry)
        self._changed.set()

    def _share_turns(self, entry: _Entry) -> None:
        """Give an entry the turns of all clients that wait for it; if there is none, it keeps what it has."""
        if entry.state is not _State.WAITING:
            return
        for client in entry.waiting:
            self._turns.join(client, entry)
        if entry.waiting:
            for client in set(self._turns.clients(entry)) - entry.waiting.keys():
                self._turns.leave(client, entry)

    async def _schedule(self) -> None:
        """Start what has its turn, whenever something has changed here, or may have in other processes."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL if self._turns else None):
                    await self._changed.wait()
            self._changed.clear()
            try:
                await self._start_next()
                if self._ended_since_trim >= _TRIM_AFTER:
                    self._ended_since_trim = 0
                    await self._logs.trim()
            except Exception:
                log.exception("builds can't be started")
                await asyncio.sleep(_POLL)

    async def _start_next(self) -> None:
        """Start what has its turn, as far as may run at once, and follow what other processes have begun."""
        await self._follow_others()
        while self._turns and self._running < self._limits.running:
            heads = self._turns.heads
            slot = await self.locks.slot(*heads)
            if slot is None:
                return
            if not await self._try_to_start(heads[slot.client], slot):
                await self._follow_others()

    async def _follow_others(self) -> None:
        for entry in list(self._turns):
            owner = await self.locks.owner(entry.build.key)
            # It may have been cancelled meanwhile.
            if owner is not None and entry.state is _State.WAITING:
                self._turns.remove(entry)
                self._follow(entry, owner)

    async def _try_to_start(self, entry: _Entry, slot: BuildSlot) -> bool:
        """Start a build, which has a slot and its key as long as it runs; not if another process is at it."""
        build = entry.build
        async with AsyncExitStack() as held:
            held.push_async_callback(slot.release)
            lock = await self.locks.acquire(build.key, build.id)
            if lock is None:
                return False
            held.push_async_callback(lock.release)
            if entry.state is not _State.WAITING:
                return False
            self._turns.remove(entry)
            self._turns.took(slot.client)
            self._running += 1
            entry.state, build.state, entry.client = _State.RUNNING, BuildState.RUNNING, slot.client
            # Not in the context of whatever build has just ended.
            entry.task = asyncio.create_task(
                self._run(entry, held.pop_all()), name=f"build {build.id}", context=build.context
            )
        return True

    # Running, here or in another process.

    async def _run(self, entry: _Entry, held: AsyncExitStack) -> None:
        build = entry.build
        try:
            async with held:
                if not await self._is_settled(entry):
                    await self._carry_out(entry)
        except asyncio.CancelledError:
            self._end(entry, BuildState.CANCELLED, BuildStoppedError(build.image, build.id))
            raise
        finally:
            self._running -= 1
            self._changed.set()

    async def _carry_out(self, entry: _Entry) -> None:
        try:
            with self._unfinished.begun(entry.build.recipe):
                image = await self._build(entry.build)
        except asyncio.CancelledError:
            # What a server stops, the next one takes over.
            if not self._stopping:
                self._unfinished.forget(entry.build.recipe)
            raise
        except Exception as error:
            self._fail(entry, error)
        else:
            self._end(entry, BuildState.FINISHED, image)

    def _fail(self, entry: _Entry, error: Exception) -> None:
        build = entry.build
        self._end(entry, BuildState.FAILED, error)
        # A full disk is mended in another place than the build, and what one client may not have another may.
        if isinstance(error, ChandleryError) and not isinstance(error, StorageError | PullDeniedError):
            self._failures.remember(build.key, error)
        log.warning("build failed", build=build.id, image=build.image, error=str(error))

    def _follow(self, entry: _Entry, owner: str) -> None:
        log.info("another process builds it", build=owner, image=entry.build.image)
        entry.state, entry.owner = _State.FOLLOWING, owner
        entry.task = asyncio.create_task(self._await_other(entry), context=entry.build.context)

    async def _await_other(self, entry: _Entry) -> None:
        """Wait for another process's build; if it comes to nothing, the build has its turn here."""
        build = entry.build
        try:
            while await self.locks.owner(build.key) is not None:
                if build.waiters:
                    await self.locks.note_waiter(build.key)
                await asyncio.sleep(_POLL)
            if await self._is_settled(entry):
                return
        except asyncio.CancelledError:
            self._end(entry, BuildState.CANCELLED, BuildStoppedError(build.image, build.id))
            raise
        self._take_turns(entry)

    async def _is_settled(self, entry: _Entry) -> bool:
        """End an entry that needs no build here, because another process had one meanwhile."""
        try:
            outcome = await self._known(entry.build.key) or self._failures.recent(entry.build.key)
        except Exception as error:
            self._fail(entry, error)
            return True
        if outcome is None:
            return False
        entry.owner = entry.owner or ""
        failed = isinstance(outcome, Exception)
        self._end(entry, BuildState.FAILED if failed else BuildState.FINISHED, outcome)
        return True

    def _end(self, entry: _Entry, state: BuildState, outcome: BuiltImage | Exception) -> None:
        entry.state, entry.build.state = _State.ENDED, state
        entry.build.step(state)
        if entry.abandoned is not None:
            entry.abandoned.cancel()
        del self._entries[entry.build.key]
        if isinstance(outcome, Exception):
            entry.build.error = outcome
            if isinstance(outcome, ChandleryError) and entry.owner is None:
                outcome.build = entry.build.id
            entry.outcome.set_exception(outcome)
            # Whoever waits hears of it; when nobody does, nobody needs to.
            entry.outcome.exception()
        else:
            entry.outcome.set_result(outcome)
        if entry.owner is not None:
            return
        self._ended.append(entry.build)
        self._ended_since_trim += 1
        for observe in self.observers:
            observe(entry.build)

    # Giving up.

    @contextmanager
    def _waits(self, entry: _Entry, client: str) -> Iterator[None]:
        """Count who waits; the last one to leave starts the time after which a build is cancelled."""
        if entry.abandoned is not None:
            entry.abandoned.cancel()
            entry.abandoned = None
        entry.build.waiters += 1
        entry.waiting[client] += 1
        entry.left_at = math.inf
        self._share_turns(entry)
        try:
            yield
        finally:
            entry.build.waiters -= 1
            entry.waiting -= Counter([client])
            self._share_turns(entry)
            if entry.build.waiters == 0 and not entry.outcome.done():
                entry.left_at = time.monotonic()
                entry.abandoned = asyncio.create_task(self._abandon(entry))

    async def _abandon(self, entry: _Entry) -> None:
        """Cancel a build for which nobody has waited for the grace time, here or in other processes."""
        left = self._limits.grace
        if entry.state is not _State.RUNNING and not entry.is_own:
            left = min(left, self._limits.queued_grace)
        while True:
            await asyncio.sleep(max(0.0, left))
            if entry.state is not _State.RUNNING:
                break
            # It may have begun since: then it is left no longer than it runs.
            left = self._limits.grace - await self.locks.last_waiter(entry.build.key)
            if left <= 0:
                break
        if entry.build.waiters == 0 and entry.state is not _State.ENDED:
            log.info("build cancelled: nobody waits for it", build=entry.build.id, image=entry.build.image)
            self._cancel(entry)

    def _cancel(self, entry: _Entry) -> None:
        if entry.task is not None:
            # A second time would interrupt what the first one has begun: stopping Nix and its builders.
            if not entry.task.cancelling():
                entry.task.cancel()
            return
        self._turns.remove(entry)
        self._end(entry, BuildState.CANCELLED, BuildStoppedError(entry.build.image, entry.build.id))
