"""Waiting for what other tasks do, and not for a while."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

# Seconds; for what takes none.
_LIMIT = 60.0


async def until(condition: Callable[[], object]) -> None:
    """Let other tasks run until something is so."""
    async with asyncio.timeout(_LIMIT):
        while not condition():  # noqa: ASYNC110 (anything may be a condition, and few have events)
            await asyncio.sleep(0)


async def suspended(*tasks: "asyncio.Task[Any]") -> None:
    """Let tasks run until each has come so far that it waits for something."""
    await until(lambda: all(map(_is_suspended, tasks)))


def _is_suspended(task: "asyncio.Task[Any]") -> bool:
    coroutine = task.get_coro()
    assert inspect.iscoroutine(coroutine)
    return inspect.getcoroutinestate(coroutine) == inspect.CORO_SUSPENDED


async def all_others_ended() -> None:
    """Let other tasks run until none is left."""
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
