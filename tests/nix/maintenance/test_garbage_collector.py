import asyncio
from pathlib import Path

from chandlery.maintenance.garbage_collector import DiskLimits, GarbageCollector
from chandlery.nix.nix import NixLimits
from tests.support.workshop import a_request, opened

HOUR = 3600.0


async def test_a_store_of_its_own_is_collected_but_what_a_build_needs(tmp_path: Path) -> None:
    async with opened(tmp_path, limits=NixLimits(begun_after=0.5)) as workshop:
        await workshop.image("hello")
        build = asyncio.create_task(workshop.images.image(a_request("greeter", "waiting-a")))
        await workshop.gates.reached("waiting-a")
        collector = GarbageCollector(workshop.stores, DiskLimits(1, HOUR))
        await collector.collect()
        workshop.gates.open("waiting-a")
        assert "greeter-1.0" in workshop.names(await build)
        assert list(workshop.nix.store_root.glob("*-greeter-1.0"))
        collected = await collector.collect()
        assert collected.freed_nix > 0
        assert not list(workshop.nix.store_root.glob("*-greeter-1.0"))
