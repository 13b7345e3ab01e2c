"""`make demo`: a registry from nothing, an image from it, and programs of that image.

The server is a process of its own, as an operator would start it, on a free port and with a new data folder;
both are gone afterwards. Programs run in docker where an engine answers, and else in `sandbox`.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from chandlery.demo import registry_client, sandbox
from chandlery.demo.registry_client import PulledImage
from chandlery.errors import ChandleryError
from chandlery.oci.documents import Platform

_IMAGE = "shell/git/jq"
_START_TIMEOUT = 300.0  # seconds; the package index is fetched before the server answers
_PULL_TIMEOUT = 1800.0
_STOP_TIMEOUT = 30.0

_PROGRAMS = (
    ("git --version", ("git", "--version"), ""),
    ("jq --version", ("jq", "--version"), ""),
    ("a shell", ("bash",), 'echo "hello from $(. /etc/os-release && echo "$PRETTY_NAME"), pid $$"\n'),
)


class DemoError(ChandleryError):
    """Something that the demo shows did not work."""


@dataclass(slots=True)
class _Registry:
    """A server that was started for the demo."""

    process: "subprocess.Popen[bytes]"
    port: int
    data_dir: Path
    log: Path
    events: list[dict[str, object]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def run(source: str | None) -> None:
    """Show it all, with progress; raises `ChandleryError` when something does not work."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="chandlery-demo-") as folder:
        work = Path(folder)
        with _registry(work, source, console) as registry:
            console.print(f"\nPulling [bold]{_IMAGE}[/bold] as an OCI client does, every digest checked:")
            with _progress(registry, console):
                first, first_time = _timed(lambda: _pull(registry, work / "first"))
            again, again_time = _timed(lambda: _pull(registry, work / "again"))
            if again.digest != first.digest:
                raise DemoError("the second pull gave another image than the first")
            engine, said = _run_programs(registry, first, work / "root")
            _report(console, registry, first, (first_time, again_time), engine, said)


@contextmanager
def _registry(work: Path, source: str | None, console: Console) -> Iterator[_Registry]:
    """Start a server and wait until it answers; it is stopped in the end, whatever happens."""
    port = _free_port()
    data_dir, log = work / "data", work / "server.log"
    console.print(f"Starting a registry at 127.0.0.1:{port}, with a new Nix store in {data_dir}")
    argv = [sys.executable, "-m", "chandlery", "serve", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--data-dir", str(data_dir)]
    if source:
        argv += ["--source", source]
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "CHANDLERY_LOG_FORMAT": "json"},
            start_new_session=True,
        )
    registry = _Registry(process, port, data_dir, log)
    try:
        with _progress(registry, console):
            _wait_until_it_answers(registry)
        yield registry
    finally:
        _stop(process)


def _wait_until_it_answers(registry: _Registry) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline:
        if registry.process.poll() is not None:
            last = registry.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise DemoError(f"the server did not start: {''.join(last).removeprefix('chandlery: ')}")
        with suppress(httpx.HTTPError):
            if httpx.get(f"{registry.url}/v2/", timeout=2).is_success:
                return
        time.sleep(0.1)
    raise DemoError(f"the server did not answer within {_START_TIMEOUT:g} s")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _pull(registry: _Registry, folder: Path) -> PulledImage:
    return registry_client.pull(registry.url, _IMAGE, "latest", folder, _PULL_TIMEOUT)


@contextmanager
def _progress(registry: _Registry, console: Console) -> Iterator[None]:
    """Print what the server logs, as it does; on a terminal also how long it has been, and what Nix does."""
    began = time.monotonic()
    done = threading.Event()

    def show() -> None:
        with console.status("") as status:
            while not done.wait(0.2):
                elapsed = time.monotonic() - began
                for line in _new_events(registry):
                    console.print(f"  {elapsed:6.1f} s  {line}")
                status.update(f"{elapsed:.0f} s{_nix_progress(registry.data_dir)}")
        for line in _new_events(registry):
            console.print(f"  {time.monotonic() - began:6.1f} s  {line}")

    shower = threading.Thread(target=show)
    shower.start()
    try:
        yield
    finally:
        done.set()
        shower.join()


def _new_events(registry: _Registry) -> list[str]:
    """Return the log's new events that say something to somebody who waits."""
    events = []
    for line in registry.log.read_bytes().splitlines():
        with suppress(msgspec.DecodeError):
            events.append(msgspec.json.decode(line, type=dict[str, object]))
    new = events[len(registry.events) :]
    registry.events = events
    return [_EVENTS[str(event["event"])](event) for event in new if event.get("event") in _EVENTS]


def _megabytes(value: object) -> str:
    return f"{int(str(value)) / 1e6:.1f} MB"


def _suite(event: Mapping[str, object]) -> str:
    return f"{event['suite']} for {event['architecture']}"


def _percent(event: Mapping[str, object]) -> str:
    return f": {event['percent']}% (file {event['file']})" if "percent" in event else ""


_EVENTS: Mapping[str, Callable[[Mapping[str, object]], str]] = {
    "fetching the debian index": lambda event: (
        f"fetching the package index of {_suite(event)}{_percent(event)}"
    ),
    "reading the debian index": lambda event: f"reading the package index of {_suite(event)}",
    "debian index fetched": lambda event: f"fetched the package index of {_suite(event)}",
    "build queued": lambda event: f"no such image yet: building {event['image']}",
    "resolved": lambda event: f"found its {event['packages']} packages, those that are always in included",
    "realised": lambda event: f"Nix built {event['store_paths']} store paths, {_megabytes(event['bytes'])}",
    "build finished": lambda event: f"packed {event['layers']} layers, {_megabytes(event['bytes'])}",
}


def _nix_progress(data_dir: Path) -> str:
    """Count what Nix has begun to fetch or build, in the newest build's log."""
    logs = sorted((data_dir / "builds").glob("*.log"))
    if not logs:
        return ""
    begun = logs[-1].read_bytes().count(b"\nbuilding '")
    return f", Nix is at its fetch or build number {begun}" if begun else ""


def _run_programs(
    registry: _Registry, image: PulledImage, root: Path
) -> tuple[str, Sequence[tuple[str, str]]]:
    """Run each program; give what ran them, and what they said."""
    if _docker_answers():
        reference = f"127.0.0.1:{registry.port}/{_IMAGE}"
        try:
            return "docker", [
                (
                    title,
                    _checked(title, _docker("run", "--rm", "--interactive", reference, *argv, stdin=stdin)),
                )
                for title, argv, stdin in _PROGRAMS
            ]
        finally:
            _docker("image", "rm", "--force", reference)
    sandbox.unpack(image.layers, root)
    environment = dict(each.split("=", 1) for each in image.config["config"]["Env"])
    return "a sandbox, since no docker engine answers", [
        (title, _checked(title, sandbox.run(root, argv, environment, stdin)))
        for title, argv, stdin in _PROGRAMS
    ]


def _docker_answers() -> bool:
    return shutil.which("docker") is not None and _docker("version").returncode == 0


def _docker(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["docker", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=_PULL_TIMEOUT,
    )


def _checked(title: str, finished: "subprocess.CompletedProcess[str]") -> str:
    if finished.returncode != 0:
        raise DemoError(f"{title} ended with {finished.returncode}: {finished.stderr.strip()}")
    return finished.stdout.strip()


def _report(
    console: Console,
    registry: _Registry,
    image: PulledImage,
    times: tuple[float, float],
    engine: str,
    said: Sequence[tuple[str, str]],
) -> None:
    realised = next(event for event in registry.events if event.get("event") == "realised")
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("asked for", f"{_IMAGE} for {Platform.of_host()}")
    table.add_row("given", str(image.digest))
    table.add_row("store paths", f"{realised['store_paths']}, {_megabytes(realised['bytes'])}")
    table.add_row("layers", f"{len(image.layers)}, {_megabytes(image.size)} compressed")
    table.add_row("first pull", f"{times[0]:.1f} s: the image was built meanwhile")
    table.add_row("second pull", f"{times[1]:.2f} s, the same image")
    for title, output in said:
        table.add_row(title, output)
    console.print(f"\n[bold]It works.[/bold] The programs ran in {engine}.\n")
    console.print(table)


def _timed(action: Callable[[], PulledImage]) -> tuple[PulledImage, float]:
    began = time.monotonic()
    result = action()
    return result, time.monotonic() - began


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
