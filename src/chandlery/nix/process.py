"""One of Nix's programs from its start to its end, or to a limit; what goes wrong is a `NixError`.

What Nix does, and what it builds, yields to serving; a daemon's builders are the daemon's.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chandlery.errors import NixError, NixMissingError
from chandlery.machine import program
from chandlery.machine.program import Limits, OutputLimitError, ProgramMissingError, TimeLimitError


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
    before: Sequence[str] = (),
) -> Result:
    """Run a program to its end, by way of `before`, if it is given; `on_output` gets stderr as it comes.

    Raises `StoppedError` at the limit of time, `NixMissingError` if there is no such program, and `NixError`
    if it says more than can be meant.
    """
    name = command[0]
    if before and shutil.which(name, path=environment.get("PATH")) is None:
        raise NixMissingError(name)
    try:
        finished = await program.run(
            (*before, *command), environment, limits, background=True, on_output=on_output
        )
    except ProgramMissingError as error:
        raise NixMissingError(name) from error
    except TimeLimitError as error:
        raise StoppedError(
            f"{name} was stopped after {round(limits.timeout, 1):g} s, the limit on this server"
        ) from error
    except OutputLimitError as error:
        raise NixError(f"{name} was stopped: {error}") from error
    return Result(finished.code, finished.stdout.decode(), finished.stderr.decode(errors="replace"))
