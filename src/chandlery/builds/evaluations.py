"""Evaluations that are part of no build: each is made once, few of them at once, and few for one client.

As a build does, an evaluation belongs to the application: requests wait for it until their deadline, and
those that come again join it. What it finds is remembered by whoever evaluates (`builds.resolver`).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from types import TracebackType
from typing import Self

from chandlery.errors import BuildStoppedError, EvaluationPendingError, TooManyEvaluationsError
from chandlery.machine.deadline import NO_DEADLINE, Deadline

Evaluate = Callable[[], Awaitable[object]]


class Evaluations:
    """At most `at_once` run at once, and as many run or wait for one client; leave it to stop them.

    `admit` is called with the client of each, and raises if that may not have another.
    """

    def __init__(self, at_once: int, admit: Callable[[str], None]) -> None:
        self._at_once = at_once
        self._admit = admit
        self._running = asyncio.Semaphore(at_once)
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}
        self._clients = Counter[str]()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def wait(
        self,
        key: Hashable,
        evaluate: Evaluate,
        image: str,
        client: str = "",
        deadline: Deadline = NO_DEADLINE,
    ) -> None:
        """Evaluate for an image, or join the evaluation that has the same key.

        Raises what `evaluate` raises, `TooManyEvaluationsError` if the client has too many, and
        `EvaluationPendingError` at the deadline: then the evaluation goes on.
        """
        task = self._tasks.get(key)
        if task is None:
            if self._clients[client] >= self._at_once:
                raise TooManyEvaluationsError(image, self._at_once)
            self._admit(client)
            task = asyncio.create_task(self._run(evaluate), name=f"evaluation for {image}")
            self._tasks[key] = task
            self._clients[client] += 1
            task.add_done_callback(lambda task: self._end(key, client, task))
        await asyncio.wait([task], timeout=deadline.left)
        if not task.done():
            raise EvaluationPendingError(image)
        if task.cancelled():
            raise BuildStoppedError(image, "none")
        task.result()

    async def _run(self, evaluate: Evaluate) -> None:
        async with self._running:
            await evaluate()

    def _end(self, key: Hashable, client: str, task: "asyncio.Task[None]") -> None:
        del self._tasks[key]
        self._clients -= Counter([client])
        if not task.cancelled():
            # Whoever waits hears of it; when nobody does, nobody needs to.
            task.exception()
