"""Starts the real `chandlery serve`, and knows every process that comes of it."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from chandlery.nix.configuration import host_paths

# Seconds, for what takes one or two.
LIMIT = 60.0

# Builders of the test package sets are programs of this machine.
HOST_PATHS = ",".join(host_paths())


@dataclass(frozen=True)
class RunningServer:
    process: "subprocess.Popen[bytes]"
    url: str
    log: Path
    mark: str

    def get(self, path: str, timeout: float = LIMIT) -> httpx.Response:
        # Whether certificates are right is the business of other tests.
        return httpx.get(f"{self.url}{path}", timeout=timeout, verify=False)  # noqa: S501

    def answers(self) -> bool:
        with suppress(httpx.TransportError):
            return self.get("/v2/").status_code in (httpx.codes.OK, httpx.codes.UNAUTHORIZED)
        return False

    def processes(self) -> list[int]:
        """Return the server, its worker, those that pack, and Nix: whoever has inherited the mark."""
        return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if self._is_ours(folder)]

    def _is_ours(self, folder: Path) -> bool:
        with suppress(OSError):
            return self.mark.encode() in (folder / "environ").read_bytes()
        return False

    def kill(self) -> None:
        """End it as a power cut would: no process has time for anything."""
        # Stopped first, so that none lives to see another die.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, number)
        self.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def plain_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without what it says about Chandlery."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CHANDLERY_")}
    return {**inherited, **variables}


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of what builds the test package sets, on a network without binary caches."""
    building = {"CHANDLERY_SUBSTITUTERS": "[]", "CHANDLERY_HOST_PATHS": HOST_PATHS}
    return plain_environment(**{**building, **variables})


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


@contextmanager
def serving(
    data_dir: Path,
    source: str,
    log: Path,
    *,
    port: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[RunningServer]:
    """Start a server in a process group of its own, and wait until it answers; nothing is left in the end."""
    port = port or free_port()
    options = ("--port", str(port), "--data-dir", str(data_dir), "--source", source)
    with _serving(options, variables or {}, port, log) as server:
        yield server


@contextmanager
def serving_with_variables(variables: Mapping[str, str], port: int, log: Path) -> Iterator[RunningServer]:
    """Likewise, with a server that environment variables alone tell what to do; they tell it the port too."""
    with _serving((), variables, port, log) as server:
        yield server


@contextmanager
def _serving(
    options: Sequence[str], variables: Mapping[str, str], port: int, log: Path
) -> Iterator[RunningServer]:
    mark = secrets.token_hex(8)
    # Nix gets little of the environment, but PATH it gets.
    path = f"{os.environ['PATH']}:/nonexistent/{mark}"
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, "-m", "chandlery", "serve", *options],
            env=environment(**{"PATH": path, **variables}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        ) as process,
    ):
        scheme = "https" if "CHANDLERY_TLS_CERTIFICATE" in variables else "http"
        server = RunningServer(process, f"{scheme}://127.0.0.1:{port}", log, mark)
        try:
            wait_until(lambda: process.poll() is not None or server.answers())
            assert process.poll() is None, log.read_text()
            yield server
        finally:
            server.kill()
