import asyncio
import os
import threading
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from chandlery.errors import StorageError
from chandlery.machine.locks import exclusive, holding, is_locked, leader, lock, open_lock, try_lock, unlock


def test_a_lock_is_held_once_and_freed(tmp_path: Path) -> None:
    first, second = (open_lock(tmp_path / "lock") for _ in range(2))
    lock(first)
    assert not try_lock(second)
    assert not try_lock(second, shared=True)
    assert is_locked(tmp_path / "lock")
    unlock(first)
    assert try_lock(second)
    os.close(second)
    assert not is_locked(tmp_path / "lock")
    os.close(first)


def test_a_shared_lock_keeps_out_those_who_want_it_alone(tmp_path: Path) -> None:
    descriptors = [open_lock(tmp_path, make=False) for _ in range(3)]
    assert all(try_lock(each, shared=True) for each in descriptors)
    assert not try_lock(descriptors[0])
    for each in descriptors:
        os.close(each)


def test_a_lock_is_not_made_unless_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), exclusive(tmp_path / "none"):
        raise AssertionError
    with pytest.raises(FileNotFoundError):
        is_locked(tmp_path / "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "file"])
def test_threads_wait_for_each_other(tmp_path: Path, name: str) -> None:
    path, entered = tmp_path / name, threading.Event()

    def enter() -> None:
        with exclusive(path, make=bool(name)):
            entered.set()

    other = threading.Thread(target=enter)
    with exclusive(path, make=bool(name)):
        other.start()
        assert is_locked(path)
        assert not entered.wait(0.05)
    assert entered.wait(10)
    other.join()


async def test_the_event_loop_goes_on_while_a_task_waits(tmp_path: Path) -> None:
    async def enter() -> None:
        async with holding(tmp_path):
            pass

    async with holding(tmp_path):
        waiting = asyncio.create_task(enter())
        await asyncio.wait([waiting], timeout=0.05)
        assert not waiting.done()
    await waiting


async def test_one_that_gives_up_holds_nothing(tmp_path: Path) -> None:
    async with holding(tmp_path):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02), holding(tmp_path):
                raise AssertionError
    assert not is_locked(tmp_path)


async def test_many_share_what_one_has_alone(tmp_path: Path) -> None:
    async with AsyncExitStack() as shared:
        for _ in range(3):
            await shared.enter_async_context(holding(tmp_path / "lock", shared=True, make=True))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02), holding(tmp_path / "lock"):
                raise AssertionError
    async with holding(tmp_path / "lock"):
        assert is_locked(tmp_path / "lock")


async def test_one_leads_and_the_next_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chandlery.machine.locks._SUCCESSION", 0.01)
    order: list[str] = []

    async def lead(name: str, end: asyncio.Event) -> None:
        async with leader(tmp_path / "lock"):
            order.append(name)
            await end.wait()

    ends = [asyncio.Event(), asyncio.Event()]
    first = asyncio.create_task(lead("first", ends[0]))
    await asyncio.sleep(0)
    second = asyncio.create_task(lead("second", ends[1]))
    await asyncio.wait([second], timeout=0.05)
    assert order == ["first"]
    ends[0].set()
    await first
    ends[1].set()
    await second
    assert order == ["first", "second"]


async def test_nobody_leads_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        async with leader(tmp_path / "none" / "lock"):
            raise AssertionError
