import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from chandlery.errors import StorageError, UnsupportedEntryError
from chandlery.layers.archive import pack_store_paths
from chandlery.machine import niceness as background
from chandlery.machine.process_pool import ProcessPool
from tests.support.physical_store import PhysicalStore


@pytest_asyncio.fixture
async def packers() -> AsyncIterator[ProcessPool]:
    async with ProcessPool(2) as started:
        yield started


@pytest.fixture
def store(tmp_path: Path) -> PhysicalStore:
    return PhysicalStore(tmp_path / "nix/store")


async def test_the_bytes_of_layers_do_not_depend_on_the_number_of_processes(
    store: PhysicalStore, tmp_path: Path
) -> None:
    paths = [store.add(f"package-{number}", {"share/text": b"%d" % number * 9000}) for number in range(6)]

    async def packed(processes: int) -> list[tuple[object, bytes]]:
        async def layer(number: int) -> tuple[object, bytes]:
            file = tmp_path / f"{processes}-{number}"
            found = await started.run(pack_store_paths, store.store_root, paths[number:], "gzip", file)
            return found, file.read_bytes()

        async with ProcessPool(processes) as started:
            return await asyncio.gather(*map(layer, range(len(paths))))

    one = await packed(1)
    assert one == await packed(4)
    assert one == [
        (
            pack_store_paths(store.store_root, paths[number:], "gzip", tmp_path / "here"),
            (tmp_path / "here").read_bytes(),
        )
        for number in range(len(paths))
    ]


async def test_a_process_is_kept_for_what_comes_next_and_ends_with_the_last(
    packers: ProcessPool,
) -> None:
    first = await packers.run(os.getpid)
    assert first != os.getpid()
    assert await packers.run(os.getpid) == first
    await packers.__aexit__(None, None, None)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


async def test_no_more_processes_run_than_there_may_be(packers: ProcessPool) -> None:
    assert len(set(await asyncio.gather(*(packers.run(os.getpid) for _ in range(8))))) <= 2


async def test_packers_yield_to_the_server(packers: ProcessPool) -> None:
    # A process so young may look before it has been told.
    while await packers.run(os.sched_getscheduler, 0) != os.SCHED_BATCH:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await packers.run(os.getpriority, os.PRIO_PROCESS, 0) == background.NICENESS
    assert os.getpriority(os.PRIO_PROCESS, 0) < background.NICENESS


async def test_where_a_sandbox_lets_nobody_yield_it_is_packed_all_the_same(
    packers: ProcessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refused)
    monkeypatch.setattr(os, "sched_setscheduler", refused)
    assert await packers.run(os.getpid) != os.getpid()


async def test_whatever_the_size_of_a_file_a_packer_stays_small(
    packers: ProcessPool, store: PhysicalStore, tmp_path: Path
) -> None:
    sparse = store.add("sparse", {"large": b""})
    os.truncate(store.physical(sparse) / "large", 1 << 30)

    await packers.run(pack_store_paths, store.store_root, [sparse], "gzip", tmp_path / "layer")

    status = await packers.run(Path.read_text, Path("/proc/self/status"))
    most = dict(line.split(":") for line in status.splitlines())["VmHWM"]
    assert int(most.split()[0]) < 80 << 10


async def test_what_goes_wrong_comes_back_and_the_process_goes_on(
    packers: ProcessPool, store: PhysicalStore, tmp_path: Path
) -> None:
    process = await packers.run(os.getpid)
    odd = store.add("odd", {".wh.gone": b""})

    with pytest.raises(UnsupportedEntryError, match="whiteout"):
        await packers.run(pack_store_paths, store.store_root, [odd], "gzip", tmp_path / "layer")

    assert not (tmp_path / "layer").exists()
    assert await packers.run(os.getpid) == process


async def test_a_packer_that_is_killed_is_an_error_and_another_takes_its_place(
    packers: ProcessPool,
) -> None:
    process = await packers.run(os.getpid)

    with pytest.raises(StorageError, match="signal 9"):
        await packers.run(signal.raise_signal, signal.SIGKILL)

    assert await packers.run(os.getpid) != process


async def test_what_a_packer_was_killed_in_is_done_once_more(packers: ProcessPool, tmp_path: Path) -> None:
    process = await packers.run(os.getpid)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = asyncio.create_task(packers.run(Path.read_bytes, pipe))
    # Each opens when a packer does. The first is closed before another packer opens the pipe, which would
    # read nothing from it; the second is opened when the first packer is gone, which would read no more.
    with await asyncio.to_thread(pipe.open, "wb"):
        os.kill(process, signal.SIGKILL)
    await gone(process)
    with await asyncio.to_thread(pipe.open, "wb") as file:
        file.write(b"read")
    assert await reading == b"read"


async def gone(process: int) -> None:
    async with asyncio.timeout(10):
        while Path(f"/proc/{process}").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_one_that_died_while_it_was_idle_is_not_asked_again(packers: ProcessPool) -> None:
    process = await packers.run(os.getpid)
    os.kill(process, signal.SIGKILL)
    await packers._idle[0].wait()
    assert await packers.run(os.getpid) != process


async def test_what_nobody_waits_for_is_killed(packers: ProcessPool, tmp_path: Path) -> None:
    process = await packers.run(os.getpid)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = asyncio.create_task(packers.run(Path.read_bytes, pipe))
    # Opens when the packer does, which then waits for what never comes.
    with await asyncio.to_thread(pipe.open, "wb"):
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


async def test_what_a_function_prints_does_not_disturb(packers: ProcessPool) -> None:
    await packers.run(print, "printed")
    assert await packers.run(os.write, 1, b"written\n") == 8


async def test_ctrl_c_is_left_to_the_server(packers: ProcessPool) -> None:
    process = await packers.run(os.getpid)
    await packers.run(signal.raise_signal, signal.SIGINT)
    assert await packers.run(os.getpid) == process


def test_a_packer_has_one_thread_when_it_is_idle() -> None:
    async def threads() -> int:
        async with ProcessPool(1) as packers:
            return await packers.run(threading.active_count)

    assert asyncio.run(threads()) == 1
