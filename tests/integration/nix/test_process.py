import os

from chandlery.machine import niceness as background
from chandlery.machine.program import Limits
from chandlery.nix.process import run


async def test_what_is_left_of_nix_is_ended_by_the_kernel() -> None:
    """If this process is killed: a shell that was told may use so many seconds of all processors."""
    limit = 20 * (os.cpu_count() or 1) + 1
    script = f'until [ "$(ulimit -t)" = {limit} ]; do :; done; ulimit -t'
    result = await run(("sh", "-c", script), {"PATH": os.environ["PATH"]}, Limits(timeout=20))
    assert result.stdout.split() == [str(limit)]


async def test_nix_and_what_it_builds_yield_to_the_server() -> None:
    # A program so short may look before it has been told.
    script = f'until [ "$(nice)" = {background.NICENESS} ]; do :; done; nice'
    result = await run(("sh", "-c", script), {"PATH": os.environ["PATH"]}, Limits(timeout=20))
    assert result.stdout.split() == [str(background.NICENESS)]
