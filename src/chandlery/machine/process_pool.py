"""The processes that pack, and compute: small, nicer than the server, killed when nobody waits for them.

One is started when there is work and none is idle, and kept for what comes next.
"""

import asyncio
import os
import pickle
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

import structlog

from chandlery.errors import StorageError
from chandlery.machine import niceness as background
from chandlery.machine.process_pool_worker import ANSWER

log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

T = TypeVar("T")
P = ParamSpec("P")

# What packers allocate is blocks, over and over: they keep the memory of those that are free (mallopt(3)).
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(16 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 20)}


class _EndedError(Exception):
    """A process was ended by a signal of this number while it worked."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ProcessPool:
    """At most `count` processes; enter it to use it, and leave it to end them."""

    def __init__(self, count: int) -> None:
        self._turns = asyncio.Semaphore(count)
        self._idle: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            await _end(self._idle.pop())

    async def run(self, function: Callable[P, T], *arguments: P.args, **_: P.kwargs) -> T:
        """Call a function of a module in one of the processes, in the order in which calls come.

        Function, arguments and what it gives are pickled. If its process is killed, it is called once more,
        in another. Raises what it raises, and `StorageError` if that is killed too; if it is cancelled, the
        process is killed.
        """
        request = pickle.dumps((function, arguments))
        async with self._turns:
            try:
                raised, pickled = await self._ask(request)
            except _EndedError as error:
                # Whoever looks for memory ends one, and that may have been enough.
                log.warning("a packing process was ended", signal=error.number)
                try:
                    raised, pickled = await self._ask(request)
                except _EndedError as again:
                    raise StorageError(
                        f"packing processes were ended by signal {again.number}: is there too little memory?"
                    ) from again
        answer: T = pickle.loads(pickled)  # noqa: S301
        if raised:
            assert isinstance(answer, Exception)  # noqa: S101
            raise answer
        return answer

    async def _ask(self, request: bytes) -> tuple[bool, bytes]:
        process = await self._process()
        try:
            answer = await _ask(process, request)
        except BaseException as error:
            await _end(process)
            if isinstance(error, (asyncio.IncompleteReadError, ConnectionError)):
                raise _EndedError(-(process.returncode or 0)) from error
            raise
        self._idle.append(process)
        return answer

    async def _process(self) -> asyncio.subprocess.Process:
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-P", "-m", "chandlery.machine.process_pool_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **_KEEP_MEMORY},
        )
        background.lower(process.pid)
        return process


async def _ask(process: asyncio.subprocess.Process, request: bytes) -> tuple[bool, bytes]:
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    process.stdin.write(request)
    await process.stdin.drain()
    raised, size = ANSWER.unpack(await process.stdout.readexactly(ANSWER.size))
    return raised, await process.stdout.readexactly(size)


async def _end(process: asyncio.subprocess.Process) -> None:
    # Not `process.kill`: it looks first whether the process has died, and takes that news from who waits.
    with suppress(ProcessLookupError):
        if process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
    # Even if whoever waits is cancelled again: until it has ended it may write where it was told to.
    await asyncio.shield(_ended(process))


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait until it has ended, and its pipes are closed."""
    assert process.stdin is not None  # noqa: S101
    assert process.stdout is not None  # noqa: S101
    await process.wait()
    process.stdin.close()
    await process.stdout.read()
    with suppress(ConnectionError):
        await process.stdin.wait_closed()
