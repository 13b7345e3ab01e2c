"""Servers while they are measured: Chandlery and its peers, each in a session of its own."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

LIMIT = 120.0  # seconds for what takes a few


@dataclass(frozen=True)
class RunningServer:
    """A server that answers, and its processes; Nix, which Chandlery starts in other sessions, is none."""

    name: str
    port: int
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """Return what its processes have used so far."""
        ticks = sum(int(fields[11]) + int(fields[12]) for _, fields in self._processes())
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> tuple[int, int]:
        """Return the bytes that its processes have in memory: PSS, and RSS (proc(5), smaps_rollup)."""
        pss = rss = 0
        for folder, _ in self._processes():
            with suppress(OSError):
                lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
                kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
                pss += kilobytes["Pss"] << 10
                rss += kilobytes["Rss"] << 10
        return pss, rss

    def _processes(self) -> Iterator[tuple[Path, list[str]]]:
        """Yield folders in /proc, with the fields of their `stat` from the third on (proc(5))."""
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid:
                    yield folder, fields

    def answers(self) -> bool:
        """Return whether somebody answers."""
        with suppress(httpx.TransportError):
            return bool(httpx.get(f"{self.url}/v2/").status_code)
        return False


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    arguments: Callable[[int], Sequence[str]],
    folder: Path,
    variables: Mapping[str, str] | None = None,
) -> Iterator[RunningServer]:
    """Start a server at a port that is free, with its log in a folder, and wait until it answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("CHANDLERY_")}
    log = folder / f"bench-{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *arguments(port)],
            env={**inherited, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    server = RunningServer(name, port, process)
    try:
        deadline = time.monotonic() + LIMIT
        while not server.answers():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{name} doesn't answer"
            time.sleep(0.05)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
