"""How a machine is examined: checks that run at once, each with a time limit, and what they find.

A check gives an `Outcome`, or raises what is wrong. Whatever else happens in it is a failure of that check
alone. What may block for ever, as a disk can that isn't there, is done in threads that nobody waits for.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from chandlery.errors import ChandleryError
from chandlery.settings.values import without_secrets

T = TypeVar("T")


class Status(StrEnum):
    """How a check ended: a failure is what keeps a server from working."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found, and what to do about it; the remedy is empty if the text says it."""

    text: str
    status: Status = Status.OK
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """Something to find out, within so many seconds."""

    name: str
    run: Callable[[], Awaitable[Outcome]]
    limit: float = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and how many seconds that took."""

    check: str
    outcome: Outcome
    seconds: float


async def examine(checks: Sequence[Check]) -> AsyncIterator[Finding]:
    """Run all checks at once, and give what each finds as soon as it has."""
    running = [asyncio.create_task(_find(check)) for check in checks]
    try:
        for finished in asyncio.as_completed(running):
            yield await finished
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def in_thread(function: Callable[[], T]) -> T:
    """Call a function that may block, in a thread that ends with the process if need be."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(result)  # type: ignore[arg-type]

    def call() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        # The loop is closed when nobody waits any more.
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=call, daemon=True).start()
    return await done


async def _find(check: Check) -> Finding:
    began = time.monotonic()
    try:
        async with asyncio.timeout(check.limit):
            outcome = await check.run()
    except TimeoutError:
        outcome = Outcome(f"no answer within {check.limit:g} s", Status.FAILURE)
    except ChandleryError as error:
        outcome = Outcome(without_secrets(str(error)), Status.FAILURE)
    except Exception as error:
        text = f"the check itself failed: {type(error).__name__}: {without_secrets(str(error))}"
        outcome = Outcome(text, Status.FAILURE)
    return Finding(check.name, outcome, time.monotonic() - began)
