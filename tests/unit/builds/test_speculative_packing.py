import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest

from chandlery.builds.build import Build
from chandlery.builds.job import Job
from chandlery.builds.speculative_packing import Packer as AnyPacker
from chandlery.builds.speculative_packing import SpeculativePacking
from chandlery.nix.closure import Closure, StorePath
from chandlery.nix.nix import Nix as RealNix
from chandlery.oci.digest import Digest
from chandlery.oci.documents import OCI_LAYER, Descriptor, PackedLayer
from chandlery.plan.strategies import STRATEGIES, LayerGroup, Popularity, closure_of
from chandlery.storage.leases import Lease
from tests.support.queues import recipe_of
from tests.support.tasks import all_others_ended, suspended, until

LARGE = 5 << 20

Plan = Callable[[Closure], Sequence[LayerGroup]]


def packed_layer(names: str) -> PackedLayer:
    digest = Digest.of(names.encode())
    return PackedLayer(Descriptor(OCI_LAYER, digest, len(names)), digest)


def path(name: str) -> str:
    return f"/nix/store/{'0' * 32}-{name}"


def expected(there: Sequence[str]) -> tuple[Closure, frozenset[StorePath]]:
    sizes = {"app": LARGE, "lib": 2 * LARGE, "data": 3 * LARGE, "small": 5}
    closure = closure_of([(path(name), size if name in there else 0, []) for name, size in sizes.items()])
    return closure, frozenset(node.path for node in closure.nodes if node.path.name in there)


JOB = Job(
    Build(recipe_of("git"), "a", Path("log"), "id", 0.0),
    cast("RealNix", None),
    Path("roots"),
    cast("Lease", None),
)


class Packer:
    """Packs when it is let; tells what was begun, and what was stopped."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.stopped: list[str] = []
        self.goes_on = asyncio.Event()

    async def pack(self, job: Job, group: LayerGroup) -> PackedLayer:
        names = ",".join(each.name for each in group.store_paths)
        self.begun.append(names)
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.stopped.append(names)
            raise
        return packed_layer(names)


def plan(closure: Closure) -> Sequence[LayerGroup]:
    return STRATEGIES["one-per-path"](closure, {}, 3)


def packing(packer: AnyPacker, grouping: Plan | None = None) -> SpeculativePacking:
    return SpeculativePacking(JOB, packer, grouping or plan, interval=0.0)


class Nix:
    """Has more and more."""

    def __init__(self, *there: str) -> None:
        self.there = list(there)
        self.asked = 0

    async def look(self) -> tuple[Closure, frozenset[StorePath]] | None:
        self.asked += 1
        return expected(self.there)


async def test_large_layers_are_packed_as_soon_as_all_of_them_is_there() -> None:
    nix, packer = Nix("data", "small"), Packer()
    async with packing(packer) as early, early.watching(nix):
        await until(lambda: packer.begun == ["data"])
        nix.there.append("lib")
        await until(lambda: packer.begun == ["data", "lib"])
        assert early.begun == 2


async def test_a_layer_of_which_something_is_missing_is_not_packed_early() -> None:
    together = Popularity({"app": 1, "small": 1}, {"app": "app", "small": "app"})
    nix, packer = Nix("app"), Packer()

    def grouped(closure: Closure) -> Sequence[LayerGroup]:
        return STRATEGIES["grouped"](closure, together, 94)

    async with packing(packer, grouped) as early, early.watching(nix):
        nix.there.append("data")
        await until(lambda: packer.begun == ["data"])
        nix.there.append("small")
        await until(lambda: packer.begun == ["data", "app,small"])


async def test_what_was_packed_early_is_given_and_the_rest_is_packed_then() -> None:
    nix, packer = Nix("data"), Packer()
    packer.goes_on.set()
    async with packing(packer) as early:
        async with early.watching(nix):
            await until(lambda: packer.begun == ["data"])
        final = plan(expected(["app", "lib", "data", "small"])[0])
        layers = [await early.layer(group) for group in final]
    assert sorted(packer.begun) == ["app,small", "data", "lib"]
    assert sorted(map(str, layers)) == sorted(str(packed_layer(name)) for name in packer.begun)
    assert packer.stopped == []


async def test_what_is_no_layer_in_the_end_is_stopped() -> None:
    nix, packer = Nix("data"), Packer()
    async with packing(packer) as early:
        async with early.watching(nix):
            await until(lambda: packer.begun == ["data"])
        assert packer.stopped == []
    assert packer.stopped == ["data"]


async def test_nothing_is_packed_early_after_nix_has_ended() -> None:
    nix, packer = Nix(), Packer()
    async with packing(packer) as early:
        async with early.watching(nix):
            pass
        nix.there.append("data")
        await all_others_ended()
    assert packer.begun == []


async def test_an_early_layer_that_fails_fails_only_who_wants_it() -> None:
    nix = Nix("data")
    begun: list[LayerGroup] = []

    class Failing:
        async def pack(self, job: Job, group: LayerGroup) -> PackedLayer:
            begun.append(group)
            raise ValueError("damaged")

    failing = Failing()
    async with packing(failing) as early:
        async with early.watching(nix):
            await until(lambda: begun)
            seen = nix.asked
            await until(lambda: nix.asked > seen + 1)
        with pytest.raises(ValueError, match="damaged"):
            await early.layer(begun[0])
    async with packing(failing) as early, early.watching(nix):
        await until(lambda: len(begun) == 2)


async def test_where_nothing_can_be_told_nothing_is_packed_early() -> None:
    asked: list[int] = []

    class Unknown:
        async def look(self) -> None:
            asked.append(1)

    packer = Packer()
    async with packing(packer) as early, early.watching(Unknown()):
        await until(lambda: asked)
        await all_others_ended()
    assert asked == [1]
    assert packer.begun == []


async def test_who_waits_for_an_early_layer_and_goes_away_stops_it() -> None:
    nix, packer = Nix("data"), Packer()
    async with packing(packer) as early:
        async with early.watching(nix):
            await until(lambda: packer.begun == ["data"])
        [group] = [each for each in plan(expected(["data"])[0]) if each.nar_size]
        waiting = asyncio.create_task(early.layer(group))
        await suspended(waiting)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert packer.stopped == ["data"]
