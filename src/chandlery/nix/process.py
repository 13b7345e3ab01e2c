"""One of Nix's programs from its start to its end, or to a limit: then it is stopped, and all it has started.

stdout and stderr are read at the same time: a build that says much on one of them never waits for somebody to
read the other. What Nix does, and what it builds, yields to serving; a daemon's builders are the daemon's.
"""

import asyncio
import math
import os
import resource
import shutil
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from chandlery.errors import NixError, NixMissingError
from chandlery.machine import niceness as background

# Seconds that Nix has to stop its builders before it is killed: Nix 2.8 overlooks a signal that comes while
# it starts a builder, and no second one helps.
_STOP_TIMEOUT = 3.0
# Of stderr, the pieces that are kept to find the error in them.
_KEPT_PIECES = 400


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may take: seconds, and bytes of memory (0: any amount)."""

    timeout: float
    memory: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended: its exit code, below 0 for a signal's number, and what it said at last."""

    code: int
    stdout: str
    stderr: str


class StoppedError(NixError):
    """A program of Nix took longer than its limit."""


async def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    limits: Limits,
    on_output: Callable[[bytes], object] | None = None,
) -> Result:
    """Run a program to its end; `on_output` gets stderr as it comes.

    Raises `StoppedError` at the limit of time, `NixMissingError` if there is no such program.
    """
    program = command[0]
    if shutil.which(program) is None:
        raise NixMissingError(program)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None  # noqa: S101
    assert process.stderr is not None  # noqa: S101
    tail: deque[bytes] = deque(maxlen=_KEPT_PIECES)
    try:
        background.lower(process.pid)
        _limit_time(process.pid, limits.timeout)
        if limits.memory:
            _limit_memory(process.pid, limits.memory)
        async with asyncio.timeout(limits.timeout), asyncio.TaskGroup() as group:
            output = group.create_task(process.stdout.read())
            group.create_task(_read(process.stderr, tail, on_output))
            group.create_task(process.wait())
    except TimeoutError as error:
        raise StoppedError(
            f"{program} was stopped after {round(limits.timeout, 1):g} s, the limit on this server"
        ) from error
    finally:
        if process.returncode is None:
            await _stop(process)
    stderr = b"".join(tail).decode(errors="replace")
    return Result(process.returncode or 0, output.result().decode(), stderr)


def _limit_time(process: int, timeout: float) -> None:
    """Let the kernel end it, and each that comes of it, if nobody does: if this process is killed.

    Within the timeout a process can't have used all processors for longer than that.
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


async def _read(
    stream: asyncio.StreamReader, tail: deque[bytes], on_output: Callable[[bytes], object] | None
) -> None:
    """Read to the end, in pieces that may be longer than a line: builders print what they like."""
    while piece := await stream.read(64 * 1024):
        tail.append(piece)
        if on_output is not None:
            on_output(piece)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Stop Nix and its builders: politely first, so that it can clean up."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT):
                await process.wait()
                return
        # Builders have sessions of their own, and would outlive a Nix that is killed.
        os.killpg(process.pid, signal.SIGSTOP)
        for number in (*_descendants(process.pid), process.pid):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    with suppress(TimeoutError):
        async with asyncio.timeout(_STOP_TIMEOUT):
            await process.wait()


def _descendants(process: int) -> list[int]:
    """Give the processes that come of a process (proc(5), "/proc/pid/task/tid/children")."""
    children: list[int] = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, listed.read_text().split())
    return [*children, *(each for child in children for each in _descendants(child))]
