import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from chandlery.build_queue import Build, BuildQueue, BuildState, QueueLimits
from chandlery.digest import Digest
from chandlery.errors import (
    BuildError,
    BuildPendingError,
    BuildStoppedError,
    StorageFullError,
    TooManyBuildsError,
)
from chandlery.oci import BuiltImage, Descriptor

IMAGE = BuiltImage({}, Descriptor("", Digest.of(b""), 0), (), 0, 0)
LOGS = Path("/nonexistent")


class Gate:
    """Work that goes on until it is told to end, and counts how often it was begun."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun: list[str] = []
        self.cancelled = 0
        self.open = asyncio.Event()
        self._error = error

    async def __call__(self, build: Build) -> BuiltImage:
        self.begun.append(build.image)
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


def ask(
    queue: BuildQueue, image: str, work: Callable[[Build], Awaitable[BuiltImage]], client: str = "a"
) -> "asyncio.Task[BuiltImage]":
    return asyncio.create_task(queue.wait(image, image, client, work))


async def test_many_who_ask_for_one_key_get_one_build() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(), LOGS) as queue:
        tasks = [ask(queue, "git", gate) for _ in range(200)]
        await until(lambda: bool(gate.begun))
        gate.open.set()
        assert await asyncio.gather(*tasks) == [IMAGE] * 200
    assert gate.begun == ["git"]


async def test_no_more_builds_run_than_the_limit() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(running=3), LOGS) as queue:
        tasks = [ask(queue, f"image{number}", gate) for number in range(10)]
        await until(lambda: len(gate.begun) == 3)
        states = [build.state for build in queue.builds()]
        assert states.count(BuildState.RUNNING) == 3
        assert states.count(BuildState.QUEUED) == 7
        gate.open.set()
        await asyncio.gather(*tasks)
    assert len(gate.begun) == 10


async def test_a_client_that_asks_for_many_images_delays_another_by_one_turn() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(running=1), LOGS) as queue:
        greedy = [ask(queue, f"greedy{number}", gate, "greedy") for number in range(20)]
        await until(lambda: len(queue.builds()) == 20)
        modest = ask(queue, "modest", gate, "modest")
        await until(lambda: len(queue.builds()) == 21)
        build = next(build for build in queue.builds() if build.image == "modest")
        assert queue.position(build) == 2
        gate.open.set()
        await asyncio.gather(*greedy, modest)
    assert gate.begun.index("modest") <= 2


async def test_a_full_queue_takes_no_other_build_but_lets_clients_join_those_it_has() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(running=1, queued=2), LOGS) as queue:
        tasks = [ask(queue, name, gate) for name in ("one", "two", "three")]
        await until(lambda: len(queue.builds()) == 3)
        with pytest.raises(TooManyBuildsError, match="four"):
            await queue.wait("four", "four", "b", gate)
        tasks.append(ask(queue, "three", gate, "b"))
        gate.open.set()
        await asyncio.gather(*tasks)


async def test_who_waits_too_long_is_told_the_build_and_its_place_and_can_ask_again() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(running=1), LOGS) as queue:
        first = ask(queue, "first", gate)
        await until(lambda: bool(gate.begun))
        with pytest.raises(BuildPendingError, match="number 1 in the queue") as pending:
            await queue.wait("second", "second", "a", gate, timeout=0)
        assert pending.value.build in {build.id for build in queue.builds()}
        again = ask(queue, "second", gate)
        gate.open.set()
        await asyncio.gather(first, again)
    assert gate.begun == ["first", "second"]


async def test_a_client_that_goes_away_cancels_nothing_that_another_waits_for() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(grace=0), LOGS) as queue:
        leaver, stayer = ask(queue, "git", gate), ask(queue, "git", gate)
        await until(lambda: bool(gate.begun))
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        gate.open.set()
        assert await stayer == IMAGE
    assert gate.cancelled == 0


async def test_a_build_that_nobody_waits_for_is_cancelled_after_the_grace_time() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(running=1, grace=0), LOGS) as queue:
        running, queued = ask(queue, "running", gate), ask(queue, "queued", gate)
        await until(lambda: bool(gate.begun) and len(queue.builds()) == 2)
        for task in (running, queued):
            task.cancel()
        await until(lambda: all(build.state is BuildState.CANCELLED for build in queue.builds()))
    assert gate.cancelled == 1
    assert gate.begun == ["running"]


async def test_a_build_that_nobody_waits_for_goes_on_during_the_grace_time() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(grace=60), LOGS) as queue:
        with pytest.raises(BuildPendingError):
            await queue.wait("git", "git", "a", gate, timeout=0)
        again = ask(queue, "git", gate)
        await until(lambda: bool(gate.begun))
        gate.open.set()
        assert await again == IMAGE
    assert gate.begun == ["git"]


async def test_who_joins_a_build_while_it_is_given_up_gets_a_new_one() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(grace=0), LOGS) as queue:
        leaver = ask(queue, "git", gate)
        await until(lambda: bool(gate.begun))
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        joiner: asyncio.Task[BuiltImage] | None = None
        loop = asyncio.get_running_loop()
        # In the step of the loop in which the timer has fired and the task hasn't ended yet.
        loop.call_later(0, lambda: None)
        joiner = ask(queue, "git", gate)
        gate.open.set()
        assert await joiner == IMAGE


async def test_a_failure_is_told_to_all_and_to_who_asks_a_moment_later_without_a_new_build() -> None:
    gate = Gate(BuildError("git", "its builder failed", []))
    async with BuildQueue(QueueLimits(failure_memory=60), LOGS) as queue:
        tasks = [ask(queue, "git", gate) for _ in range(3)]
        await until(lambda: bool(gate.begun))
        gate.open.set()
        assert all(
            isinstance(each, BuildError) for each in await asyncio.gather(*tasks, return_exceptions=True)
        )
        with pytest.raises(BuildError, match="its builder failed"):
            await queue.wait("git", "git", "a", gate)
    assert gate.begun == ["git"]


@pytest.mark.parametrize(
    ("memory", "error"), [(0.0, BuildError("git", "failed", [])), (60.0, StorageFullError("/data"))]
)
async def test_a_failure_that_is_over_or_was_a_full_disk_is_tried_again(
    memory: float, error: Exception
) -> None:
    gate = Gate(error)
    gate.open.set()
    async with BuildQueue(QueueLimits(failure_memory=memory), LOGS) as queue:
        for _ in range(2):
            with pytest.raises(type(error)):
                await queue.wait("git", "git", "a", gate)
    assert gate.begun == ["git", "git"]


async def test_stopping_ends_what_runs_and_tells_who_waits_to_ask_again() -> None:
    gate = Gate()
    async with BuildQueue(QueueLimits(running=1), LOGS) as queue:
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

    async with BuildQueue(QueueLimits(), LOGS) as queue:
        await queue.wait("git", "git", "a", work)
        await queue.wait("jq", "jq", "a", work)
        jq, git = queue.builds()
    assert [name for name, _ in git.timeline] == ["resolve", "build", "finished"]
    assert [seconds for _, seconds in git.timeline] == sorted(seconds for _, seconds in git.timeline)
    assert git.log_file != jq.log_file
    assert git.log_file.name == f"{git.id}.log"
