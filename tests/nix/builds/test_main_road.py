"""The calls of one pull, as docs/architecture.md lists them, in the trace of a real one."""

import ast
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

import chandlery
from chandlery.maintenance.repaired_blobs import RepairedBlobs
from chandlery.registry.api import routes
from tests.support.workshop import NAME_PREFIXES, opened

FOLDER = Path(chandlery.__file__).parent
ARCHITECTURE = (FOLDER.parent.parent / "docs" / "architecture.md").read_text()

# Requests come to handlers, output is read as it comes, and what reads blobs reads those of any reader.
TOLD = {
    ("registry.endpoint", "registry.api"),
    ("machine.program", "nix.log"),
    ("nix.log", "nix.nix"),
    ("storage.blob_store", "maintenance.repaired_blobs"),
}
# Here calls may only go down; elsewhere, such as within sources, a room has its own ways.
ROOMS_OF_THE_ROAD = ("registry", "builds")


def listed() -> list[str]:
    """Return the calls that the documentation lists, `module.Class.method` or `module.function`."""
    section = ARCHITECTURE.partition("## One pull, call by call")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. +`([\w.]+)`", section, flags=re.MULTILINE)


def module_of(frame: FrameType) -> str | None:
    file = Path(frame.f_code.co_filename)
    if not file.is_relative_to(FOLDER):
        return None
    return ".".join(file.relative_to(FOLDER).with_suffix("").parts)


class Trace:
    """The functions of Chandlery that were called, in the order of their first calls, and who called whom."""

    def __init__(self) -> None:
        self.called: dict[str, None] = {}
        self.calls: set[tuple[str, str]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        module = module_of(frame) if event == "call" else None
        if module is None:
            return
        self.called.setdefault(f"{module}.{frame.f_code.co_qualname}")
        caller = frame.f_back
        while caller is not None and module_of(caller) is None:
            caller = caller.f_back
        if caller is not None:
            self.calls.add((module_of(caller) or "", module))

    @contextmanager
    def recording(self) -> Iterator[None]:
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


@pytest.fixture
async def trace(tmp_path: Path) -> Trace:
    """Pull an image that has to be built, with one package that Nix has to build."""
    found = Trace()
    async with opened(tmp_path) as workshop, workshop.leases.lease() as lease:
        blobs = RepairedBlobs(workshop.stores, workshop.images, lease)
        app = Starlette(routes=routes(workshop.images, blobs, NAME_PREFIXES))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://registry", timeout=600) as client:
            with found.recording():
                response = await client.get("/v2/hello/manifests/latest")
            while response.status_code == 307:
                response = await client.get(response.url.join(response.headers["location"]))
        assert response.status_code == 200, response.text
    return found


def imported() -> dict[str, set[str]]:
    """Return for each module what it imports of Chandlery, directly or not."""
    direct: dict[str, set[str]] = {}
    for path in FOLDER.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        module = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
        direct[module] = {name.removeprefix("chandlery.") for name in names if name.startswith("chandlery.")}
    below: dict[str, set[str]] = {}
    for module in direct:
        pending, seen = [module], set[str]()
        while pending:
            for each in direct.get(pending.pop(), set()) & direct.keys() - seen:
                seen.add(each)
                pending.append(each)
        below[module] = seen
    return below


async def test_a_pull_makes_the_calls_that_are_listed_in_their_order(trace: Trace) -> None:
    order = list(trace.called)
    wanted = listed()
    assert len(wanted) > 15
    assert not [call for call in wanted if call not in trace.called], "listed, and not called"
    assert wanted == sorted(wanted, key=order.index)


async def test_no_call_goes_back_up(trace: Trace) -> None:
    below = imported()
    upwards = {
        (caller, callee)
        for caller, callee in trace.calls - TOLD
        if caller in below[callee]
        and (
            caller.partition(".")[0] != callee.partition(".")[0]
            or caller.partition(".")[0] in ROOMS_OF_THE_ROAD
        )
    }
    assert not upwards
