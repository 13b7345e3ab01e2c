import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from chandlery.machine import program
from chandlery.machine.program import Finished, Limits, OutputLimitError, ProgramMissingError, TimeLimitError

ENVIRONMENT = {"PATH": os.environ["PATH"]}
# A program, one in its group, and one in a session of its own; none of them ends when asked to.
STUBBORN = """
trap '' TERM
sh -c 'echo $$ > group; while :; do sleep 60; done' &
setsid sh -c 'echo $$ > session; while :; do sleep 60; done' &
until [ -s group ] && [ -s session ]; do :; done
echo $$ > program
echo all started >&2
while :; do sleep 60; done
"""


async def run(script: str, limits: Limits | None = None, **options: object) -> Finished:
    arguments: Sequence[str] = ("sh", "-c", script)
    return await program.run(arguments, ENVIRONMENT, limits or Limits(20.0), **options)  # type: ignore[arg-type]


def gone(folder: Path) -> bool:
    """Return whether none of what STUBBORN started is alive, in a while."""
    numbers = [int((folder / name).read_text()) for name in ("program", "group", "session")]
    until = time.monotonic() + 10
    while any(alive(number) for number in numbers):
        if time.monotonic() > until:
            return False
    return True


def alive(number: int) -> bool:
    try:
        # A zombie, which nobody has asked about yet, has ended.
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_program_gets_input_environment_and_folder_and_is_read(tmp_path: Path) -> None:
    script = "cat; pwd; echo $PATH; echo complaint >&2; exit 3"
    finished = await run(script, stdin=b"input\n" * 100_000, folder=tmp_path)
    assert finished.code == 3
    assert finished.stdout == b"input\n" * 100_000 + f"{tmp_path}\n{ENVIRONMENT['PATH']}\n".encode()
    assert finished.stderr == b"complaint\n"


async def test_a_program_may_leave_its_input_unread() -> None:
    assert (await run("exit 0", stdin=bytes(1 << 20))).code == 0


async def test_a_program_without_input_reads_none() -> None:
    assert (await run("cat")).stdout == b""


async def test_a_signal_is_an_exit_code_below_0() -> None:
    assert (await run("kill -9 $$")).code == -9


async def test_a_program_has_no_terminal() -> None:
    assert (await run(": < /dev/tty")).code != 0


async def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ProgramMissingError, match="no-such-program was not found"):
        await program.run(("no-such-program",), ENVIRONMENT, Limits(1.0))


async def test_output_comes_as_it_is_said_and_its_end_is_kept() -> None:
    heard: list[bytes] = []
    finished = await run(
        "for i in 1 2 3; do echo $i >&2; done", Limits(20.0, complaint=2), on_output=heard.append
    )
    assert b"".join(heard) == b"1\n2\n3\n"
    assert finished.stderr == b"3\n"


async def test_a_program_that_says_too_much_is_stopped() -> None:
    with pytest.raises(OutputLimitError):
        await run("yes", Limits(20.0, output=1 << 20))


async def test_a_program_that_complains_without_end_is_bounded() -> None:
    with pytest.raises(TimeLimitError):
        await run("yes >&2", Limits(0.5))


async def test_a_program_is_silent_for_so_long_only() -> None:
    # It takes longer than it may be silent.
    assert (await run("for i in 1 2 3 4 5; do echo; sleep 0.2; done", Limits(20.0, silence=0.8))).code == 0
    with pytest.raises(TimeLimitError):
        await run("echo; sleep 60", Limits(20.0, silence=0.2))


async def test_a_program_may_clean_up(tmp_path: Path) -> None:
    script = "trap 'echo > cleaned; exit' TERM; while :; do sleep 0.01; done"
    with pytest.raises(TimeLimitError):
        await run(script, Limits(0.5), folder=tmp_path)
    assert (tmp_path / "cleaned").exists()


async def test_nothing_is_left_of_a_program_after_its_time(tmp_path: Path) -> None:
    with pytest.raises(TimeLimitError):
        await run(STUBBORN, Limits(2.0), folder=tmp_path)
    assert gone(tmp_path)


async def test_nothing_is_left_of_a_program_whose_output_can_not_be_taken(tmp_path: Path) -> None:
    def full(_: bytes) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        await run(STUBBORN, folder=tmp_path, on_output=full)
    assert gone(tmp_path)


@pytest.mark.parametrize("times", [1, 2])
async def test_nothing_is_left_of_a_program_that_nobody_wants(tmp_path: Path, times: int) -> None:
    """A second cancellation, while it is stopped politely, hurries and leaves nothing either."""
    started = asyncio.Event()
    task = asyncio.create_task(run(STUBBORN, folder=tmp_path, on_output=lambda _: started.set()))
    await started.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(tmp_path)


async def test_what_a_program_leaves_in_its_group_goes_with_it(tmp_path: Path) -> None:
    """It has ended, and something holds its output open."""
    script = "sh -c 'echo $$ > group; cp group program; cp group session; exec sleep 60' & exit 0"
    with pytest.raises(TimeLimitError):
        await run(script, Limits(1.0), folder=tmp_path)
    assert gone(tmp_path)
