import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path

import pytest

from chandlery.builds.build import Build, BuildState
from chandlery.builds.build_queue import SELF_REPAIR, TAKEN_OVER, Known, QueueLimits
from chandlery.errors import (
    BuildDisplacedError,
    BuildError,
    BuildPendingError,
    BuildStoppedError,
    RateLimitError,
    StorageFullError,
    TooManyBuildsError,
)
from chandlery.oci.documents import BuiltImage
from tests.support.queues import IMAGE, Work, WorkQueue, name_of, nothing_known, recipe_of

LOGS = Path("builds")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Gate:
    """Work that goes on until it is told to end, and counts how often it was begun."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun: list[str] = []
        self.cancelled = 0
        self.open = asyncio.Event()
        self._error = error

    async def __call__(self, build: Build) -> BuiltImage:
        self.begun.append(name_of(build))
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._error:
            raise self._error
        return IMAGE


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def ask(queue: WorkQueue, image: str, work: Work, client: str = "a") -> "asyncio.Task[BuiltImage]":
    return asyncio.create_task(queue.ask(image, work, client))


async def test_many_who_ask_for_one_key_get_one_build() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(), LOGS) as queue:
        tasks = [ask(queue, "git", gate) for _ in range(200)]
        await until(lambda: bool(gate.begun))
        gate.open.set()
        assert await asyncio.gather(*tasks) == [IMAGE] * 200
    assert gate.begun == ["git"]


async def test_only_what_starts_a_build_asks_whether_its_client_may_have_one() -> None:
    admitted: list[str] = []

    def admit(client: str) -> None:
        if client == "refused":
            raise RateLimitError("builds", 1, "hour", 60)
        admitted.append(client)

    gate = Gate()
    async with WorkQueue(QueueLimits(admit=admit), LOGS) as queue:
        tasks = [ask(queue, "git", gate, "a"), ask(queue, "git", gate, "b")]
        await until(lambda: bool(gate.begun))
        with pytest.raises(RateLimitError):
            await ask(queue, "jq", gate, "refused")
        tasks.append(ask(queue, "git", gate, "refused"))
        gate.open.set()
        assert await asyncio.gather(*tasks) == [IMAGE] * 3
    assert admitted == ["a"]
    assert gate.begun == ["git"]


async def test_no_more_builds_run_than_the_limit() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=3), LOGS) as queue:
        tasks = [ask(queue, f"image{number}", gate) for number in range(10)]
        await until(lambda: len(gate.begun) == 3)
        states = [build.state for build in queue.builds()]
        assert states.count(BuildState.RUNNING) == 3
        assert states.count(BuildState.QUEUED) == 7
        gate.open.set()
        await asyncio.gather(*tasks)
    assert len(gate.begun) == 10


async def test_what_a_server_does_for_itself_counts_against_no_clients_limits() -> None:
    def admit(client: str) -> None:
        pytest.fail(f"{client} was counted")

    gate = Gate()
    gate.open.set()
    async with WorkQueue(QueueLimits(admit=admit), LOGS) as queue:
        for client in (SELF_REPAIR, TAKEN_OVER):
            assert await queue.ask(client, gate, client) == IMAGE


async def test_a_client_that_asks_for_many_images_delays_another_by_one_turn() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1), LOGS) as queue:
        greedy = [ask(queue, f"greedy{number}", gate, "greedy") for number in range(20)]
        await until(lambda: len(queue.builds()) == 20)
        modest = ask(queue, "modest", gate, "modest")
        await until(lambda: len(queue.builds()) == 21)
        build = next(build for build in queue.builds() if name_of(build) == "modest")
        assert queue.position(build) == 2
        gate.open.set()
        await asyncio.gather(*greedy, modest)
    assert gate.begun.index("modest") <= 2


async def test_a_full_queue_takes_no_other_build_but_lets_clients_join_those_it_has() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1, queued=2), LOGS) as queue:
        tasks = [ask(queue, name, gate, f"client of {name}") for name in ("one", "two", "three")]
        await until(lambda: len(queue.builds()) == 3)
        with pytest.raises(TooManyBuildsError, match="four"):
            await queue.ask("four", gate, "b")
        tasks.append(ask(queue, "three", gate, "b"))
        gate.open.set()
        await asyncio.gather(*tasks)


# Shares of clients


async def test_one_client_that_fills_the_queue_stops_nobody_else() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1, queued=5), LOGS) as queue:
        greedy = [ask(queue, f"greedy{number}", gate, "greedy") for number in range(6)]
        await until(lambda: queue.queued == 5)
        with pytest.raises(TooManyBuildsError, match="greedy6"):
            await queue.ask("greedy6", gate, "greedy")
        modest = [ask(queue, f"modest{number}", gate, "modest") for number in range(2)]
        with pytest.raises(BuildDisplacedError, match=r"greedy5 .* a client with fewer builds") as displaced:
            await greedy.pop()
        assert displaced.value.retry_after > 0
        with pytest.raises(BuildDisplacedError, match="greedy4"):
            await greedy.pop()
        assert queue.queued == 5
        # Now the difference is one, with the one that runs: nobody displaces anybody any more.
        modest.append(ask(queue, "modest2", gate, "modest"))
        with pytest.raises(BuildDisplacedError, match="greedy3"):
            await greedy.pop()
        for client in ("greedy", "modest"):
            with pytest.raises(TooManyBuildsError, match="another"):
                await queue.ask("another", gate, client)
        gate.open.set()
        assert await asyncio.gather(*greedy, *modest) == [IMAGE] * 6
    states = [build.state for build in queue.builds()]
    assert (states.count(BuildState.CANCELLED), states.count(BuildState.FINISHED)) == (3, 6)


async def test_what_nobody_waits_for_gives_way_in_a_full_queue_whoever_asked_for_it() -> None:
    gate = Gate()
    limits = QueueLimits(running=1, queued=2, absence=0.0)
    async with WorkQueue(limits, LOGS) as queue:
        tasks = [ask(queue, name, gate, f"client of {name}") for name in ("running", "waited for")]
        await until(lambda: bool(gate.begun))
        with pytest.raises(BuildPendingError):
            await queue.ask("left", gate, "client of left", timeout=0)
        tasks.append(ask(queue, "new", gate, "client of new"))
        await until(lambda: any(build.state is BuildState.CANCELLED for build in queue.builds()))
        gate.open.set()
        await asyncio.gather(*tasks)
    assert gate.begun == ["running", "waited for", "new"]


async def test_a_client_between_two_requests_of_one_pull_keeps_its_build_in_a_full_queue() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1, queued=1), LOGS) as queue:
        running = ask(queue, "running", gate, "a")
        await until(lambda: bool(gate.begun))
        with pytest.raises(BuildPendingError):
            await queue.ask("sent on", gate, "b", timeout=0)
        with pytest.raises(TooManyBuildsError):
            await queue.ask("new", gate, "c")
        again = ask(queue, "sent on", gate, "b")
        gate.open.set()
        await asyncio.gather(running, again)
    assert gate.begun == ["running", "sent on"]


async def test_what_has_not_begun_is_left_for_a_shorter_time_than_what_runs() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1, grace=60.0, queued_grace=0.0), LOGS) as queue:
        for name in ("running", "queued"):
            with pytest.raises(BuildPendingError):
                await queue.ask(name, gate, timeout=0.05)
        taken_over = asyncio.create_task(queue.ask("own", gate, TAKEN_OVER, timeout=0))
        with pytest.raises(BuildPendingError):
            await taken_over
        await until(lambda: queue.queued == 1)
        gate.open.set()
        await until(lambda: queue.queued == 0 and queue.running == 0)
    states = {name_of(build): build.state for build in queue.builds()}
    assert states == {
        "running": BuildState.FINISHED,
        "queued": BuildState.CANCELLED,
        "own": BuildState.FINISHED,
    }


async def test_a_build_that_begins_after_it_was_left_has_the_grace_of_one_that_runs() -> None:
    first, gate = Gate(), Gate()
    async with WorkQueue(QueueLimits(running=1, grace=60.0, queued_grace=0.2), LOGS) as queue:
        running = ask(queue, "first", first)
        await until(lambda: bool(first.begun))
        for name in ("left", "left later"):
            with pytest.raises(BuildPendingError):
                await queue.ask(name, gate, timeout=0)
        first.open.set()
        await running
        await until_slowly(lambda: queue.queued == 0)
        later, left, _ = queue.builds()
        assert (later.state, left.state) == (BuildState.CANCELLED, BuildState.RUNNING)
        gate.open.set()
        await until(lambda: queue.running == 0)
    assert gate.begun == ["left"]


async def test_what_the_server_wants_itself_gives_way_to_nobody() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1, queued=3, absence=0.0), LOGS) as queue:
        own = [ask(queue, f"own{number}", gate, SELF_REPAIR) for number in range(4)]
        await until(lambda: queue.queued == 3)
        with pytest.raises(TooManyBuildsError):
            await queue.ask("other", gate, "a")
        gate.open.set()
        await asyncio.gather(*own)


async def test_who_is_refused_displaces_nothing() -> None:
    def admit(client: str) -> None:
        if client == "refused":
            raise RateLimitError("builds", 1, "hour", 60)

    gate = Gate()
    async with WorkQueue(QueueLimits(running=1, queued=3, admit=admit), LOGS) as queue:
        greedy = [ask(queue, f"greedy{number}", gate, "greedy") for number in range(4)]
        await until(lambda: queue.queued == 3)
        with pytest.raises(RateLimitError):
            await queue.ask("other", gate, "refused")
        gate.open.set()
        assert await asyncio.gather(*greedy) == [IMAGE] * 4


async def test_a_build_that_a_client_joins_has_its_turn_too() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1), LOGS) as queue:
        greedy = [ask(queue, f"greedy{number}", gate, "greedy") for number in range(10)]
        await until(lambda: queue.queued == 9)
        build = next(build for build in queue.builds() if name_of(build) == "greedy9")
        assert queue.position(build) == 9
        joined = ask(queue, "greedy9", gate, "modest")
        await until(lambda: build.waiters == 2)
        assert queue.position(build) == 2
        leaver = greedy.pop()
        leaver.cancel()
        await until(lambda: build.waiters == 1)
        assert queue.position(build) == 2
        gate.open.set()
        await asyncio.gather(joined, *greedy)
    assert gate.begun.index("greedy9") <= 2


async def test_slow_builds_of_one_client_leave_a_slot_for_another() -> None:
    slow, gate = Gate(), Gate()
    gate.open.set()
    async with WorkQueue(QueueLimits(running=4, reserved=1), LOGS) as queue:
        greedy = [ask(queue, f"greedy{number}", slow, "greedy") for number in range(8)]
        await until(lambda: len(slow.begun) == 3)
        for number in range(3):
            assert await queue.ask(f"modest{number}", gate, "modest") == IMAGE
        assert len(slow.begun) == 3
        # Of what waits, that has the slot which a client joins that has none.
        joined = ask(queue, "greedy7", slow, "third")
        await until(lambda: len(slow.begun) == 4)
        assert slow.begun[-1] == "greedy7"
        slow.open.set()
        await asyncio.gather(joined, *greedy)


async def test_who_waits_too_long_is_told_the_build_and_its_place_and_can_ask_again() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1), LOGS) as queue:
        first = ask(queue, "first", gate)
        await until(lambda: bool(gate.begun))
        with pytest.raises(BuildPendingError, match="number 1 in the queue") as pending:
            await queue.ask("second", gate, "a", timeout=0)
        assert pending.value.build in {build.id for build in queue.builds()}
        again = ask(queue, "second", gate)
        gate.open.set()
        await asyncio.gather(first, again)
    assert gate.begun == ["first", "second"]


async def test_a_client_that_goes_away_cancels_nothing_that_another_waits_for() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(grace=0), LOGS) as queue:
        leaver, stayer = ask(queue, "git", gate), ask(queue, "git", gate)
        await until(lambda: bool(gate.begun))
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        gate.open.set()
        assert await stayer == IMAGE
    assert gate.cancelled == 0


async def test_a_build_that_nobody_waits_for_is_cancelled_after_the_grace_time() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1, grace=0), LOGS) as queue:
        running, queued = ask(queue, "running", gate), ask(queue, "queued", gate)
        await until(lambda: bool(gate.begun) and len(queue.builds()) == 2)
        for task in (running, queued):
            task.cancel()
        await until(lambda: all(build.state is BuildState.CANCELLED for build in queue.builds()))
    assert gate.cancelled == 1
    assert gate.begun == ["running"]


async def test_a_build_that_nobody_waits_for_goes_on_during_the_grace_time() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(grace=60), LOGS) as queue:
        with pytest.raises(BuildPendingError):
            await queue.ask("git", gate, "a", timeout=0)
        again = ask(queue, "git", gate)
        await until(lambda: bool(gate.begun))
        gate.open.set()
        assert await again == IMAGE
    assert gate.begun == ["git"]


async def test_who_joins_a_build_while_it_is_given_up_gets_a_new_one() -> None:
    first, again = Gate(), Gate()
    again.open.set()
    given_up, stopped = asyncio.Event(), asyncio.Event()

    async def slow_to_stop(build: Build) -> BuiltImage:
        try:
            return await first(build)
        except asyncio.CancelledError:
            given_up.set()
            await stopped.wait()
            raise

    async with WorkQueue(QueueLimits(grace=0), LOGS) as queue:
        leaver = ask(queue, "git", slow_to_stop)
        await until(lambda: bool(first.begun))
        leaver.cancel()
        await given_up.wait()
        joiner = ask(queue, "git", again)
        await until(lambda: queue.builds()[0].waiters == 1)
        stopped.set()
        assert await joiner == IMAGE
    assert (first.begun, again.begun) == (["git"], ["git"])


async def test_a_failure_is_told_to_all_and_to_who_asks_a_moment_later_without_a_new_build() -> None:
    gate = Gate(BuildError("git", "its builder failed", []))
    async with WorkQueue(QueueLimits(failure_memory=60), LOGS) as queue:
        tasks = [ask(queue, "git", gate) for _ in range(3)]
        await until(lambda: bool(gate.begun))
        gate.open.set()
        assert all(
            isinstance(each, BuildError) for each in await asyncio.gather(*tasks, return_exceptions=True)
        )
        with pytest.raises(BuildError, match="its builder failed"):
            await queue.ask("git", gate, "a")
    assert gate.begun == ["git"]


@pytest.mark.parametrize(
    ("memory", "error"), [(0.0, BuildError("git", "failed", [])), (60.0, StorageFullError("/data"))]
)
async def test_a_failure_that_is_over_or_was_a_full_disk_is_tried_again(
    memory: float, error: Exception
) -> None:
    gate = Gate(error)
    gate.open.set()
    async with WorkQueue(QueueLimits(failure_memory=memory), LOGS) as queue:
        for _ in range(2):
            with pytest.raises(type(error)):
                await queue.ask("git", gate, "a")
    assert gate.begun == ["git", "git"]


async def test_stopping_ends_what_runs_and_tells_who_waits_to_ask_again() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1), LOGS) as queue:
        tasks = [ask(queue, "one", gate), ask(queue, "two", gate)]
        await until(lambda: bool(gate.begun) and len(queue.builds()) == 2)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, BuildStoppedError) for outcome in outcomes)
    assert gate.begun == ["one"]


async def test_a_build_has_a_timeline_and_a_log_of_its_own() -> None:
    async def work(build: Build) -> BuiltImage:
        build.step("resolve")
        build.step("build")
        return IMAGE

    async with WorkQueue(QueueLimits(), LOGS) as queue:
        await queue.ask("git", work, "a")
        await queue.ask("jq", work, "a")
        jq, git = queue.builds()
    assert [name for name, _ in git.timeline] == ["resolve", "build", "finished"]
    assert [seconds for _, seconds in git.timeline] == sorted(seconds for _, seconds in git.timeline)
    assert git.log_file != jq.log_file
    assert git.log_file.name == f"{git.id}.log"


async def test_steps_follow_each_other_from_the_question_to_the_end() -> None:
    async def work(build: Build) -> BuiltImage:
        build.step("resolve")
        build.step("build")
        return IMAGE

    async with WorkQueue(QueueLimits(), LOGS) as queue:
        await queue.ask("git", work, "a")
        (build,) = queue.builds()
    names, begins, ends = zip(*build.steps, strict=True)
    assert names == ("queued", "resolve", "build")
    assert begins[1:] == ends[:-1]
    assert (begins[0], ends[-1]) == (0.0, build.seconds)
    assert build.seconds == build.seconds, "the time of a build that has ended stands still"


async def test_a_build_runs_in_the_context_of_who_asked_first_whatever_it_waited_for() -> None:
    asking: ContextVar[str] = ContextVar("asking")
    seen = {}

    async def work(build: Build) -> BuiltImage:
        seen[name_of(build)] = asking.get()
        return IMAGE

    async with WorkQueue(QueueLimits(running=1), LOGS) as queue:
        tasks = []
        for image in ("one", "two", "three"):
            asking.set(f"asks for {image}")
            tasks.append(ask(queue, image, work))
        await asyncio.gather(*tasks)
    assert seen == {image: f"asks for {image}" for image in ("one", "two", "three")}


async def test_observers_are_told_of_every_end() -> None:
    told: list[tuple[str, BuildState]] = []
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1), LOGS) as queue:
        queue.observers.append(lambda build: told.append((name_of(build), build.state)))
        failing = Gate(BuildError("bad", "its builder failed", []))
        failing.open.set()
        await asyncio.gather(ask(queue, "bad", failing), return_exceptions=True)
        tasks = [ask(queue, "running", gate), ask(queue, "waiting", gate)]
        await until(lambda: bool(gate.begun) and queue.queued == 1)
        assert queue.running == 1
    await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(told) == [("bad", "failed"), ("running", "cancelled"), ("waiting", "cancelled")]


async def test_the_error_of_a_build_has_its_id() -> None:
    gate = Gate(BuildError("git", "its builder failed", []))
    gate.open.set()
    async with WorkQueue(QueueLimits(), LOGS) as queue:
        with pytest.raises(BuildError) as failed:
            await queue.ask("git", gate, "a")
        (build,) = queue.builds()
        assert failed.value.build == build.id
        assert queue.find(build.id) is build
        assert queue.find("another") is None


async def test_who_waits_or_asks_when_the_queue_stops_is_told_to_come_again() -> None:
    gate = Gate()
    async with WorkQueue(QueueLimits(running=1), LOGS) as queue:
        tasks = [ask(queue, "running", gate), ask(queue, "waiting", gate)]
        await until(lambda: bool(gate.begun) and queue.queued == 1)
        queue.stop()
        outcomes = await asyncio.gather(*tasks, ask(queue, "late", gate), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [BuildStoppedError] * 3
    assert gate.begun == ["running"]


async def test_stopping_twice_lets_a_build_clean_up_once_and_to_the_end() -> None:
    began, cleaned = asyncio.Event(), False

    async def work(build: Build) -> BuiltImage:
        nonlocal cleaned
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned = True
        return IMAGE

    async with WorkQueue(QueueLimits(), LOGS) as queue:
        task = ask(queue, "git", work)
        await began.wait()
        queue.stop()
        await asyncio.sleep(0)
        queue.stop()
    await asyncio.gather(task, return_exceptions=True)
    assert cleaned


async def test_logs_are_trimmed_while_builds_go_on() -> None:
    async def work(build: Build) -> BuiltImage:
        build.log_file.touch()
        return IMAGE

    async with WorkQueue(QueueLimits(), LOGS) as queue:
        for number in range(300):
            await queue.ask(f"image{number}", work)
        await until_slowly(lambda: len(list(LOGS.glob("*.log"))) <= 220)
        newest = queue.builds()[0]
        assert newest.log_file.exists()


# Several processes


@asynccontextmanager
async def two_queues(
    limits: QueueLimits, known: Known = nothing_known
) -> AsyncIterator[tuple[WorkQueue, WorkQueue]]:
    """Return the queues of two processes, as far as they can tell."""
    async with WorkQueue(limits, LOGS, known) as first, WorkQueue(limits, LOGS, known) as second:
        yield first, second


class Git:
    """The image of git, if another process has made it."""

    made: BuiltImage | None = None

    async def __call__(self, key: str) -> BuiltImage | None:
        return self.made if key == recipe_of("git").key else None


async def test_what_another_process_builds_is_awaited_without_a_turn() -> None:
    gate, git_image = Gate(), Git()
    async with two_queues(QueueLimits(running=1), git_image) as (first, second):
        tasks = [ask(first, "git", gate)]
        await until(lambda: bool(gate.begun))
        tasks.append(ask(second, "git", gate))
        await asyncio.sleep(0)
        (build,) = first.builds()
        with pytest.raises(BuildPendingError) as pending:
            await second.ask("git", gate, "b", 0.0)
        assert (pending.value.build, pending.value.position) == (build.id, 0)
        assert (second.builds(), second.running, second.queued) == ([], 0, 0)
        git_image.made = IMAGE
        gate.open.set()
        assert await asyncio.gather(*tasks) == [IMAGE] * 2
        assert second.builds() == []
    assert gate.begun == ["git"]


async def test_what_another_process_has_built_is_given_though_no_build_may_run_here() -> None:
    git, jq, git_image = Gate(), Gate(), Git()
    async with two_queues(QueueLimits(running=1), git_image) as (first, second):
        tasks = [ask(first, "git", git), ask(first, "jq", jq)]
        await until(lambda: bool(git.begun))
        waiting = ask(second, "git", git)
        await asyncio.sleep(0)
        git_image.made = IMAGE
        git.open.set()
        async with asyncio.timeout(5):
            assert await waiting == IMAGE
        assert (jq.begun, tasks[1].done()) == (["jq"], False)
        jq.open.set()
        await asyncio.gather(*tasks)


async def test_what_another_process_gives_up_is_built_by_the_one_that_waits() -> None:
    gate, git_image = Gate(), Git()
    async with two_queues(QueueLimits(running=1), git_image) as (first, second):
        asked = ask(first, "git", gate)
        await until(lambda: bool(gate.begun))
        waiting = ask(second, "git", gate)
        await asyncio.sleep(0)
        first.stop()
        with pytest.raises(BuildStoppedError):
            await asked
        gate.open.set()
        assert await waiting == IMAGE
        assert [build.state for build in second.builds()] == [BuildState.FINISHED]
    assert gate.begun == ["git", "git"]


async def test_how_a_build_failed_is_told_to_those_who_wait_in_another_process() -> None:
    gate = Gate(BuildError("git", "no", []))
    async with two_queues(QueueLimits()) as (first, second):
        tasks = [ask(first, "git", gate)]
        await until(lambda: bool(gate.begun))
        tasks.append(ask(second, "git", gate))
        await asyncio.sleep(0)
        gate.open.set()
        for task in tasks:
            with pytest.raises(BuildError, match="git could not be built: no") as raised:
                await task
            assert raised.value.build == first.builds()[0].id
        assert second.builds() == []
    assert gate.begun == ["git"]


async def test_no_more_builds_run_than_the_limit_over_all_processes() -> None:
    gate = Gate()
    async with two_queues(QueueLimits(running=2)) as queues:
        tasks = [ask(queue, f"{number}{name}", gate) for number, queue in enumerate(queues) for name in "abc"]
        await until(lambda: len(gate.begun) == 2)
        assert sum(queue.running for queue in queues) == 2
        assert sum(queue.queued for queue in queues) == 4
        gate.open.set()
        await asyncio.gather(*tasks)
    assert len(gate.begun) == 6


async def test_of_one_slot_the_processes_take_turns() -> None:
    first_builds, gate = Gate(), Gate()
    async with two_queues(QueueLimits(running=1)) as (first, second):
        greedy = [ask(first, f"greedy{number}", first_builds, "greedy") for number in range(20)]
        await until(lambda: bool(first_builds.begun))
        modest = ask(second, "modest", gate, "modest")
        await until(lambda: second.queued == 1)
        await second.locks.slot()  # at its next look at the latest
        gate.open.set()
        first_builds.open.set()
        await modest
        assert len(first_builds.begun) < 20
        await asyncio.gather(*greedy)


async def test_a_slot_is_left_for_another_client_over_all_processes() -> None:
    slow, gate = Gate(), Gate()
    gate.open.set()
    async with two_queues(QueueLimits(running=3, reserved=1)) as (first, second):
        greedy = [
            ask(queue, name, slow, "greedy")
            for queue, name in zip([first, second] * 3, "abcdef", strict=True)
        ]
        await until(lambda: len(slow.begun) == 2)
        assert await first.ask("modest", gate, "modest") == IMAGE
        assert await second.ask("modest", gate, "modest") == IMAGE
        assert len(slow.begun) == 2
        slow.open.set()
        await asyncio.gather(*greedy)


async def test_a_build_goes_on_as_long_as_somebody_waits_in_another_process() -> None:
    gate, git_image = Gate(), Git()
    async with two_queues(QueueLimits(grace=0.3), git_image) as (first, second):
        asked = ask(first, "git", gate)
        await until(lambda: bool(gate.begun))
        asked.cancel()
        with pytest.raises(BuildPendingError):
            await second.ask("git", gate, "b", 1.0)
        assert gate.cancelled == 0
        await until_slowly(lambda: gate.cancelled == 1)


async def until_slowly(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
