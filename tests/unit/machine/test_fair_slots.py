import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from chandlery.machine.fair_slots import FairSlots, NoRoomError


class Works:
    """Works that hold a slot until they are let go; `begun` names them in the order of their turns."""

    def __init__(self, slots: FairSlots) -> None:
        self.slots = slots
        self.begun: list[str] = []
        self.gate = asyncio.Semaphore(0)

    def start(self, client: str, *, first: bool = False) -> "asyncio.Task[None]":
        return asyncio.create_task(self._work(client, first))

    async def _work(self, client: str, first: bool) -> None:
        async with self.slots.slot(client, first=first):
            self.begun.append(client)
            await self.gate.acquire()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def finish(self, number: int = 1) -> None:
        for _ in range(number):
            self.gate.release()
            await self.settle()


async def test_no_more_than_the_slots_are_held() -> None:
    works = Works(FairSlots(2, 100))
    tasks = [works.start("alice") for _ in range(5)]
    await works.settle()
    assert len(works.begun) == 2
    await works.finish()
    assert len(works.begun) == 3
    await works.finish(4)
    await asyncio.gather(*tasks)
    assert len(works.begun) == 5


async def test_clients_take_turns_however_much_one_of_them_asks_for() -> None:
    works = Works(FairSlots(1, 100))
    for client in ("busy", "busy", "busy", "busy", "alice", "bob", "alice"):
        works.start(client)
    await works.settle()
    await works.finish(7)
    assert works.begun == ["busy", "busy", "alice", "bob", "busy", "alice", "busy"]


async def test_who_goes_first_waits_for_no_line() -> None:
    works = Works(FairSlots(1, 100))
    for client in ("a", "b", "c"):
        works.start(client)
    works.start("known", first=True)
    await works.settle()
    await works.finish(4)
    assert works.begun == ["a", "known", "b", "c"]


async def test_where_too_many_wait_the_last_of_the_longest_line_gives_way() -> None:
    works = Works(FairSlots(1, 4))
    works.start("running")
    flood = [works.start("flood") for _ in range(4)]
    await works.settle()
    with pytest.raises(NoRoomError):
        async with works.slots.slot("flood"):
            pass
    others = [works.start(client) for client in ("alice", "bob", "carol")]
    await works.settle()
    assert [task.done() for task in flood] == [False, True, True, True]
    assert all(isinstance(task.exception(), NoRoomError) for task in flood[1:])
    # One of each waits now: nobody has to give way.
    with pytest.raises(NoRoomError):
        async with works.slots.slot("dave"):
            pass
    await works.finish(5)
    await asyncio.gather(*others, flood[0])


@contextmanager
def nothing_is_lost(slots: FairSlots) -> Iterator[None]:
    """Whatever happens within, all slots are free afterwards."""
    yield
    assert slots._free == 2
    assert not slots._others._waiting
    assert not slots._first._waiting


async def test_who_stops_waiting_leaves_its_place_to_the_others() -> None:
    slots = FairSlots(2, 100)
    with nothing_is_lost(slots):
        works = Works(slots)
        tasks = [works.start(client) for client in ("a", "b", "c", "d", "d")]
        await works.settle()
        tasks[2].cancel()
        tasks[3].cancel()
        await works.settle()
        await works.finish(3)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert works.begun == ["a", "b", "d"]


async def test_a_turn_is_passed_on_by_who_is_cancelled_as_it_comes() -> None:
    slots = FairSlots(2, 100)
    with nothing_is_lost(slots):
        works = Works(slots)
        async with slots.slot("a"):
            running, cancelled, last = (works.start(client) for client in ("b", "c", "d"))
            await works.settle()
        # "c" has the slot, and is cancelled before it has run.
        cancelled.cancel()
        await works.settle()
        assert works.begun == ["b", "d"]
        await works.finish(2)
        await asyncio.gather(running, last)
