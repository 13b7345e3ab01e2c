import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from chandlery.image.name import LATEST
from chandlery.nix.nix import Nix, NixLimits
from chandlery.oci.documents import Platform
from tests.support.channel_server import ChannelServer, channel_server
from tests.support.channel_source import CHANNEL, opened
from tests.support.nix_package_set import requires_nix, resolve

HOST = Platform.of_host()


# With Nix


@pytest.fixture
def server() -> Iterator[ChannelServer]:
    with channel_server() as server:
        yield server


def output_of(program: Path) -> str:
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.strip()


@requires_nix
async def test_packages_are_built_of_a_channel_that_moves(server: ChannelServer, tmp_path: Path) -> None:
    nix = Nix(tmp_path / "nix", NixLimits())
    await nix.check()
    printed = {}
    async with opened(server, tmp_path) as source:
        for text in ("one", "two"):
            server.publish(CHANNEL, text)
            resolution = await resolve(nix, await source.pin(LATEST, HOST), "revision")
            assert resolution.found, resolution.message
            await nix.realise([resolution.derivation], tmp_path / "roots" / text, tmp_path / "log")
            program = nix.store_root / resolution.store_path.base_name / "bin/revision"
            printed[text] = output_of(program)
        server.stop()
        stale = await source.pin(LATEST, HOST)
        assert (await resolve(nix, stale, "unrar")).status == "unfree"
        assert (await resolve(nix, stale, "python3Packages.numpy")).found
    async with opened(server, tmp_path, config={"allowUnfree": True}) as free:
        assert (await resolve(nix, await free.pin(LATEST, HOST), "unrar")).found
    assert printed == {"one": "one", "two": "two"}
