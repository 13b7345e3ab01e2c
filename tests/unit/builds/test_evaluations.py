import asyncio
from collections.abc import Callable

import pytest

from chandlery.builds.build_queue import admit_all
from chandlery.builds.evaluations import Evaluations
from chandlery.errors import (
    BuildStoppedError,
    EvaluationFailedError,
    EvaluationPendingError,
    RateLimitError,
    TooManyEvaluationsError,
)
from chandlery.machine.deadline import Deadline


class Work:
    """Evaluates until it is told to end, and counts how often it was begun."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun = 0
        self.open = asyncio.Event()
        self._error = error

    async def __call__(self) -> None:
        self.begun += 1
        await self.open.wait()
        if self._error:
            raise self._error


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_what_several_ask_for_is_evaluated_once_and_counts_once() -> None:
    admitted: list[str] = []
    work = Work()
    async with Evaluations(4, admitted.append) as evaluations:
        tasks = [asyncio.create_task(evaluations.wait("git", work, "git", client)) for client in "aab"]
        await until(lambda: work.begun == 1)
        work.open.set()
        await asyncio.gather(*tasks)
    assert (work.begun, admitted) == (1, ["a"])


async def test_at_the_deadline_an_evaluation_goes_on_for_who_comes_again() -> None:
    work = Work()
    async with Evaluations(4, admit_all) as evaluations:
        with pytest.raises(EvaluationPendingError, match="git") as pending:
            await evaluations.wait("git", work, "git", "a", Deadline.after(0))
        assert pending.value.retry_after > 0
        again = asyncio.create_task(evaluations.wait("git", work, "git", "a"))
        await until(lambda: work.begun == 1)
        work.open.set()
        await again
    assert work.begun == 1


async def test_one_client_has_few_at_once_and_stops_nobody_else() -> None:
    works = [Work() for _ in range(4)]
    async with Evaluations(2, admit_all) as evaluations:
        tasks = [asyncio.create_task(evaluations.wait(n, works[n], f"{n}", "greedy")) for n in range(2)]
        await until(lambda: works[1].begun == 1)
        with pytest.raises(TooManyEvaluationsError, match="another"):
            await evaluations.wait("another", Work(), "another", "greedy")
        # Gone clients have their evaluations, as long as these go on.
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        with pytest.raises(TooManyEvaluationsError):
            await evaluations.wait("another", Work(), "another", "greedy")
        modest = asyncio.create_task(evaluations.wait(2, works[2], "2", "modest"))
        works[0].open.set()
        await until(lambda: works[2].begun == 1)
        for work in works:
            work.open.set()
        await asyncio.gather(tasks[1], modest)
        await evaluations.wait(3, works[3], "3", "greedy")


async def test_who_may_not_have_another_evaluates_nothing() -> None:
    def admit(client: str) -> None:
        raise RateLimitError("builds", 1, "hour", 60)

    work = Work()
    async with Evaluations(2, admit) as evaluations:
        for _ in range(5):
            with pytest.raises(RateLimitError):
                await evaluations.wait("git", work, "git", "a")
    assert work.begun == 0


async def test_a_failure_is_told_and_tried_again() -> None:
    work = Work(EvaluationFailedError({}))
    work.open.set()
    async with Evaluations(2, admit_all) as evaluations:
        for _ in range(2):
            with pytest.raises(EvaluationFailedError):
                await evaluations.wait("git", work, "git", "a")
    assert work.begun == 2


async def test_leaving_stops_what_runs_and_tells_who_waits_to_come_again() -> None:
    work = Work()
    async with Evaluations(2, admit_all) as evaluations:
        waiting = asyncio.create_task(evaluations.wait("git", work, "git", "a"))
        await until(lambda: work.begun == 1)
    with pytest.raises(BuildStoppedError):
        await waiting
