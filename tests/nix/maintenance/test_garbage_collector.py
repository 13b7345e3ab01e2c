import asyncio
import os
import signal
from pathlib import Path

import pytest

from chandlery.builds.images import BuildCapacity
from chandlery.builds.limits import BuildLimits
from chandlery.builds.wanted_collection import WantedCollection
from chandlery.errors import BuildError, BuildTooLargeError, LowDiskError
from chandlery.maintenance.background import in_background
from chandlery.maintenance.garbage_collector import DiskLimits, GarbageCollector
from chandlery.nix.nix import NixLimits
from chandlery.sources.debian.index import DebianMirrors
from chandlery.sources.kinds import parse
from tests.support.nix_package_set import packages
from tests.support.processes import commands
from tests.support.small_disk import needs_root, small_disk
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


# Before it is time


SUPPORT = 'cacert = build "cacert" "mkdir $out"; iana-etc = build "iana-etc" "mkdir $out";'


@needs_root
async def test_a_build_ends_when_too_little_of_the_disk_is_left_and_what_it_left_goes(tmp_path: Path) -> None:
    packages(
        tmp_path / "set",
        f"""
        {SUPPORT} small = build "small" "mkdir $out";
        part = build "part" "head -c 20000000 /dev/zero > $out";
        big = build "big" "
          test -e ${{part}}; head -c 25000000 /dev/zero > $out; until [ -e /nowhere ]; do sleep 0.05; done
        ";
        """,
    )
    least = 30_000_000
    limits = NixLimits(build_timeout=60.0, begun_after=0.5, free_disk=least)
    capacity = BuildCapacity(build=BuildLimits(free_disk=least))
    source = parse(f"path!{tmp_path / 'set'}", tmp_path, DebianMirrors("", "", ""))
    with small_disk(tmp_path / "disk", "70M"):
        async with opened(tmp_path / "disk", capacity=capacity, limits=limits, source=source) as workshop:
            with pytest.raises(LowDiskError, match=r"min_free_disk keeps 30\.0 MB") as refused:
                await workshop.image("big")
            assert refused.value.free < least
            assert not workshop.left_over()
            # As if somebody else had filled it.
            (tmp_path / "disk/other").write_bytes(bytes(25_000_000))
            with pytest.raises(LowDiskError):
                await workshop.image("small")
            await GarbageCollector(workshop.stores, DiskLimits(free=least)).keep_limits()
            assert "small" in workshop.names(await workshop.image("small"))


async def test_garbage_is_collected_at_once_when_a_build_was_refused(tmp_path: Path) -> None:
    packages(tmp_path / "set", f"""{SUPPORT} big = build "big" "head -c 3000000 /dev/zero > $out";""")
    capacity = BuildCapacity(build=BuildLimits(closure_size=1_000_000, build_size=1 << 30, free_disk=0))
    source = parse(f"path!{tmp_path / 'set'}", tmp_path, DebianMirrors("", "", ""))
    (tmp_path / "data").mkdir()
    async with opened(tmp_path / "data", capacity=capacity, source=source) as workshop:
        collector = GarbageCollector(workshop.stores, DiskLimits(1_000_000, HOUR))
        async with in_background(lambda: collector.run(3600.0)):
            with pytest.raises(
                BuildTooLargeError, match=r"big takes (more than )?3\.\d MB.*max_closure_size"
            ):
                await workshop.image("big")
            store = workshop.nix.store_root
            async with asyncio.timeout(60):
                while [*store.glob("*-big")]:  # noqa: ASYNC110 (a folder has no event)
                    await asyncio.sleep(0.05)


async def test_garbage_is_collected_at_once_when_the_disk_has_lost_a_part_of_the_limit(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as workshop:
        collector = GarbageCollector(workshop.stores, DiskLimits(1_000_000, HOUR))
        async with in_background(lambda: collector.run(3600.0)):
            await asyncio.sleep(0)
            file = tmp_path / "large"
            file.write_bytes(bytes(3_000_000))
            path = await workshop.nix.add(file, tmp_path / "roots")
            (tmp_path / "roots" / path.base_name).unlink()
            async with asyncio.timeout(60):
                while list(workshop.nix.store_root.glob("*-large")):  # noqa: ASYNC110 (a folder has no event)
                    await asyncio.sleep(0.05)


async def test_what_a_killed_builder_was_writing_goes_with_the_next_wanted_collection(tmp_path: Path) -> None:
    async with opened(tmp_path) as workshop:
        build = workshop.building("waiting-a")
        await workshop.gates.reached("waiting-a")
        collector = GarbageCollector(workshop.stores, DiskLimits())
        WantedCollection(tmp_path).want()
        await collector.keep_limits()
        [sandbox] = workshop.nix.store_root.glob("*-waiting-a-1.0.drv.chroot")
        for process in commands(f"{tmp_path}/tmp"):
            os.kill(process, signal.SIGKILL)
        with pytest.raises(BuildError):
            await build
        assert sandbox.exists()
        WantedCollection(tmp_path).want()
        await collector.keep_limits()
        assert not sandbox.exists()
        workshop.gates.open("waiting-a")
