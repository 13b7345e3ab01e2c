"""Keeps unit tests to this process: one that starts a program or connects to a server fails."""

import sys
from collections.abc import Iterator

import pytest

_OUTSIDE = {
    *("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"),
    "socket.connect",
}
_running: list[str] = []


def _stay_inside(event: str, _: object) -> None:
    if _running and event in _OUTSIDE:
        raise RuntimeError(
            f"{event} in a unit test: tests of programs and servers belong to tests/integration"
        )


# A hook stays as long as the interpreter (PEP 578), so it is the fixture that says when it counts.
sys.addaudithook(_stay_inside)


@pytest.fixture(autouse=True)
def inside(request: pytest.FixtureRequest) -> Iterator[None]:
    """See above."""
    _running.append(request.node.nodeid)
    yield
    _running.pop()
