"""A program from its start to its end, or to a limit: then it is stopped, and all that it has started.

stdout and stderr are read at the same time: a program that says much on one of them never waits for somebody
to read the other. A program has a session of its own, so no terminal where it could ask a person, and is
stopped in one way, whether by a limit, an error or a cancellation: politely, so that it can clean up; after
three seconds it is killed with its process group and whatever it has started in other sessions.
"""

import asyncio
import math
import os
import resource
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chandlery.machine import niceness

# Seconds to end in, once asked to: Nix stops its builders in it. Nix 2.8 overlooks a signal that comes while
# it starts a builder, and no second one helps.
_STOP_TIMEOUT = 3.0
_PIECE = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may take.

    In all `timeout` seconds, and `silence` seconds without output (None: any number); `memory` bytes of data
    for each process (0: any amount); `output` bytes of stdout; `file_size` bytes in each file that it writes
    (0: any number). Of stderr the last `complaint` bytes are kept.
    """

    timeout: float
    silence: float | None = None
    memory: int = 0
    output: int = 256 << 20
    complaint: int = 1 << 20
    file_size: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended: its exit code, below 0 for a signal's number, and what it said (at last)."""

    code: int
    stdout: bytes
    stderr: bytes


class ProgramError(Exception):
    """A program did not run to its end; the caller makes of it what it means there."""


class ProgramMissingError(ProgramError):
    """There is no such program on the PATH that it was to be run with."""


class TimeLimitError(ProgramError):
    """A program took longer than its limit, or was silent for longer."""


class OutputLimitError(ProgramError):
    """A program said more on stdout than its limit."""


async def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    limits: Limits,
    *,
    stdin: bytes = b"",
    folder: Path | None = None,
    background: bool = False,
    on_output: Callable[[bytes], object] | None = None,
) -> Finished:
    """Run a program, found on the environment's PATH, to its end; what it exits with is no error.

    It works in `folder` (None: where this process does); in the `background` it yields to this process.
    stderr goes to `on_output` as it comes, in pieces that may be longer than a line; if it returns something
    to await, no more is read until then. Raises `ProgramMissingError`, `TimeLimitError` and
    `OutputLimitError`.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ProgramMissingError(f"{command[0]} was not found") from error
    try:
        if background:
            niceness.lower(process.pid)
        _limit_time(process.pid, limits.timeout)
        if limits.memory:
            _limit_memory(process.pid, limits.memory)
        if limits.file_size:
            with suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limits.file_size, limits.file_size))
        return await _finish(process, limits, stdin, on_output)
    except BaseException as error:
        await _stop(process)
        if isinstance(error, TimeoutError):
            raise TimeLimitError(f"{command[0]} took too long") from error
        raise


async def _finish(
    process: asyncio.subprocess.Process,
    limits: Limits,
    stdin: bytes,
    on_output: Callable[[bytes], object] | None,
) -> Finished:
    """Read what a program says until it ends. Raises `TimeoutError` and `OutputLimitError`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limits.timeout

    def heard() -> None:
        if limits.silence is not None:
            timeout.reschedule(min(deadline, loop.time() + limits.silence))

    async with asyncio.timeout_at(deadline) as timeout:
        heard()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_write(process.stdin, stdin))
                output = group.create_task(_read_all(process.stdout, limits.output, heard))
                complaint = group.create_task(_read_last(process.stderr, limits.complaint, heard, on_output))
                group.create_task(process.wait())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
    return Finished(process.returncode or 0, output.result(), complaint.result())


async def _write(stream: asyncio.StreamWriter | None, content: bytes) -> None:
    """Write all of it, or what a program reads of it that ends first."""
    if stream is not None:
        with suppress(BrokenPipeError, ConnectionResetError):
            stream.write(content)
            await stream.drain()
            stream.close()


async def _read_all(stream: asyncio.StreamReader | None, most: int, heard: Callable[[], None]) -> bytes:
    """Read to the end. Raises `OutputLimitError` after `most` bytes."""
    read = bytearray()
    while stream is not None and (piece := await stream.read(_PIECE)):
        heard()
        read += piece
        if len(read) > most:
            raise OutputLimitError(f"it said more than {most >> 20} MiB")
    return bytes(read)


async def _read_last(
    stream: asyncio.StreamReader | None,
    most: int,
    heard: Callable[[], None] | None = None,
    on_output: Callable[[bytes], object] | None = None,
) -> bytes:
    """Read to the end, and return the last `most` bytes."""
    kept = bytearray()
    while stream is not None and (piece := await stream.read(_PIECE)):
        if heard is not None:
            heard()
        if on_output is not None:
            taken = on_output(piece)
            if isinstance(taken, Awaitable):
                await taken
        kept += piece
        del kept[: max(0, len(kept) - most)]
    return bytes(kept)


def _limit_time(process: int, timeout: float) -> None:
    """Let the kernel end it, and each process that comes of it, if nobody does: if this process is killed.

    Within the timeout (seconds) a process can't have used all processors for longer than that.
    """
    seconds = math.ceil(timeout * (os.cpu_count() or 1)) + 1
    with suppress(OSError):
        resource.prlimit(process, resource.RLIMIT_CPU, (seconds, seconds))


def _limit_memory(process: int, limit: int) -> None:
    """Let a process have so many bytes of data, and be the first to go if the machine has no memory left."""
    with suppress(ProcessLookupError):
        resource.prlimit(process, resource.RLIMIT_DATA, (limit, limit))
    with suppress(OSError):
        Path(f"/proc/{process}/oom_score_adj").write_text("1000")


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Stop a program and what it has started: politely, then all that is left. A cancellation hurries it."""
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        await _end(process)
    finally:
        _kill(process)
    await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Wait a while until a program has ended, and with it its output: until then its pipes are open."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_STOP_TIMEOUT), asyncio.TaskGroup() as group:
            for stream in (process.stdout, process.stderr):
                group.create_task(_read_last(stream, 0))
            group.create_task(process.wait())


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill the group of a process; if it hasn't ended yet, also what it has started in other sessions."""
    with suppress(ProcessLookupError):
        if process.returncode is None:
            # Stopped, it starts nothing while it is looked what it has started.
            os.killpg(process.pid, signal.SIGSTOP)
            for number in _descendants(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)


def _descendants(process: int) -> list[int]:
    """Return the processes that come of a process (proc(5), "/proc/pid/task/tid/children")."""
    children: list[int] = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, listed.read_text().split())
    return [*children, *(each for child in children for each in _descendants(child))]
