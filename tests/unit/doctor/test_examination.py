import asyncio
import threading

import pytest

from chandlery.doctor.examination import Check, Finding, Outcome, Status, examine, in_thread
from chandlery.errors import StorageError


async def examined(*checks: Check) -> list[Finding]:
    return [finding async for finding in examine(checks)]


async def fine() -> Outcome:
    return Outcome("fine")


async def test_each_check_gives_what_it_found() -> None:
    async def worrying() -> Outcome:
        return Outcome("worrying", Status.WARNING, "do something")

    found = {each.check: each.outcome for each in await examined(Check("a", fine), Check("b", worrying))}
    assert found == {"a": Outcome("fine"), "b": Outcome("worrying", Status.WARNING, "do something")}


async def test_what_is_found_first_is_told_first_and_all_run_at_once() -> None:
    second_began = asyncio.Event()

    async def waiting() -> Outcome:
        await second_began.wait()
        return Outcome("waited")

    async def beginning() -> Outcome:
        second_began.set()
        return Outcome("began")

    found = await examined(Check("first", waiting), Check("second", beginning))
    assert [each.outcome.text for each in found] == ["began", "waited"]


async def test_an_error_is_a_failure_without_its_secrets() -> None:
    async def failing() -> Outcome:
        raise StorageError("https://user:hush@example.com is full: free some")

    [found] = await examined(Check("a", failing))
    assert found.outcome == Outcome("https://***@example.com is full: free some", Status.FAILURE)


async def test_a_check_that_crashes_is_a_failure_of_that_check_alone() -> None:
    async def crashing() -> Outcome:
        raise ZeroDivisionError("division by zero")

    found = {each.check: each.outcome for each in await examined(Check("a", crashing), Check("b", fine))}
    assert found["a"].status == Status.FAILURE
    assert found["a"].text == "the check itself failed: ZeroDivisionError: division by zero"
    assert found["b"] == Outcome("fine")


async def test_a_check_that_takes_too_long_is_a_failure() -> None:
    [found] = await examined(Check("a", asyncio.Event().wait, limit=0.05))  # type: ignore[arg-type]
    assert found.outcome == Outcome("no answer within 0.05 s", Status.FAILURE)
    assert found.seconds >= 0.05


async def test_nobody_waits_for_a_thread_that_hangs() -> None:
    hanging = threading.Event()

    def hang() -> Outcome:
        hanging.wait()
        return Outcome("late")

    try:
        [found] = await examined(Check("disk", lambda: in_thread(hang), limit=0.05))
        assert found.outcome.status == Status.FAILURE
    finally:
        hanging.set()


async def test_a_thread_gives_its_result_or_its_error() -> None:
    assert await in_thread(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)
