from pathlib import Path
from typing import NoReturn

import pytest

from chandlery.builds.growth_watch import GrowthWatch
from chandlery.builds.limits import BuildLimits
from chandlery.errors import BuildTooLargeError
from chandlery.nix.closure import Closure, StorePath
from chandlery.nix.nix import Nix, NixLimits
from chandlery.plan.strategies import closure_of

LIMITS = BuildLimits(closure_size=100, build_size=300)
APP = f"/nix/store/{'0' * 32}-app"


class Store(Nix):
    """A store that a build adds to, which takes a time to find out."""

    def __init__(self, machine: "Machine", added: int) -> None:
        super().__init__(Path("/data"), NixLimits())
        self.machine = machine
        self.size = added
        self.looked_at: list[float] = []

    async def added(self, derivations: object, since: int, scratch: Path) -> int:
        self.looked_at.append(self.machine.now)
        self.machine.now += self.machine.effort
        return self.size


class Progress:
    """How much of an image is there."""

    size = 0

    async def look(self) -> tuple[Closure, frozenset[StorePath]]:
        closure = closure_of([(APP, self.size, [])])
        return closure, frozenset(node.path for node in closure.nodes)


class OverError(Exception):
    pass


class Machine:
    """A disk that loses some bytes each second, of `seconds`, and a clock for them."""

    def __init__(self, lost: int, seconds: float, effort: float = 0.0) -> None:
        self.now, self.lost, self.seconds, self.effort = 0.0, lost, seconds, effort
        self.size = 10_000

    def free(self, folder: Path) -> int:
        self.now += 1.0
        self.size -= self.lost
        if self.now > self.seconds:
            raise OverError
        return self.size

    async def watch(self, store: Store, progress: Progress | None = None) -> NoReturn:
        watch = GrowthWatch(LIMITS, 0.0, lambda: self.now, self.free)
        await watch.watch("git", store, "/nix/store/x.drv", 0, Path("/scratch"), progress or Progress())


async def test_a_build_is_looked_at_only_when_the_disk_has_lost_what_it_may_write() -> None:
    machine = Machine(lost=10, seconds=20)
    store = Store(machine, added=50)
    with pytest.raises(OverError):
        await machine.watch(store)
    assert store.looked_at[0] == 12
    assert len(store.looked_at) == 9


async def test_a_build_is_looked_at_seldom_though_the_disk_loses_nothing() -> None:
    machine = Machine(lost=0, seconds=100)
    store = Store(machine, added=50)
    with pytest.raises(OverError):
        await machine.watch(store)
    assert store.looked_at == [32, 63, 94]


async def test_looks_take_a_small_part_of_the_time() -> None:
    machine = Machine(lost=1000, seconds=1000, effort=5.0)
    store = Store(machine, added=50)
    with pytest.raises(OverError):
        await machine.watch(store)
    assert 5.0 * len(store.looked_at) <= 50


@pytest.mark.parametrize(
    ("written", "there", "setting"), [(301, 0, "max_build_size"), (150, 101, "max_closure_size")]
)
async def test_a_build_that_is_too_much_is_stopped(written: int, there: int, setting: str) -> None:
    machine, progress = Machine(lost=200, seconds=20), Progress()
    progress.size = there
    with pytest.raises(BuildTooLargeError) as stopped:
        await machine.watch(Store(machine, written), progress)
    assert stopped.value.setting == setting


async def test_what_others_write_stops_no_build() -> None:
    machine = Machine(lost=500, seconds=20)
    with pytest.raises(OverError):
        await machine.watch(Store(machine, 300), Progress())
