"""The checks of `chandlery doctor` on machines as they should be, and on others."""

import os
from pathlib import Path

from chandlery.doctor.examination import Outcome, Status
from chandlery.nix.stores import AS_ROOT, AS_USER
from tests.support.doctor_checks import examined, outcome
from tests.support.package_sets import SOURCE
from tests.support.servers import free_port, serving

# Nix


async def test_nix_and_its_sandbox_work(tmp_path: Path) -> None:
    found = await outcome("nix", tmp_path)
    assert found.status == Status.OK
    assert found.text.startswith("Nix 2.")
    expected = Outcome("Nix builds in its sandbox")
    if os.geteuid() == 0:
        expected = Outcome(f"{expected.text}, and {AS_ROOT}", Status.WARNING, AS_USER)
    assert await outcome("sandbox", tmp_path) == expected


# sources


async def test_each_source_is_pinned_by_its_name(tmp_path: Path) -> None:
    assert (await outcome("source", tmp_path)).text.startswith(f"{SOURCE} is at ")
    sources = {"ours": SOURCE, "theirs": "path!/proc/nowhere"}
    options = {"sources": sources, "source": "ours"}
    assert (await outcome("sources.ours", tmp_path, **options)).status == Status.OK
    found = await outcome("sources.theirs", tmp_path, **options)
    assert found.status == Status.FAILURE
    assert "sources.theirs" in found.text
    assert "there is no folder /proc/nowhere" in found.text


async def test_beside_a_server_that_runs(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path / "data", SOURCE, tmp_path / "log", port=port):
        found = await examined("address", tmp_path / "data", port=port)
        assert found == Outcome(f"a Chandlery answers at 127.0.0.1 port {port}")
        assert "a server uses it" in (await examined("data folder", tmp_path / "data", port=port)).text
        assert (await examined("nix", tmp_path / "data", port=port)).status == Status.OK
