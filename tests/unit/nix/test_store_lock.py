import asyncio
from pathlib import Path

from chandlery.nix.store_lock import Reader, StoreLock
from tests.support.tasks import suspended, until


async def collect(gate: StoreLock, said: list[str], ending: asyncio.Event | None = None) -> None:
    async with gate.collecting():
        said.append("collecting")
        if ending:
            await ending.wait()
        said.append("collected")


async def begin(gate: StoreLock, said: list[str]) -> None:
    async with gate.beginning():
        said.append("begun")


async def test_builds_begin_together(tmp_path: Path) -> None:
    gate = StoreLock(tmp_path, 1000)
    async with asyncio.timeout(5), gate.beginning(), gate.beginning(), StoreLock(tmp_path, 1000).beginning():
        pass


async def test_a_collector_waits_until_builds_have_begun_and_keeps_others_from_it(tmp_path: Path) -> None:
    said, ending = list[str](), asyncio.Event()
    ours, others = StoreLock(tmp_path, 1000), StoreLock(tmp_path, 1000)  # as of two processes
    async with ours.beginning():
        collector = asyncio.create_task(collect(others, said, ending))
        await suspended(collector)
        builds = [asyncio.create_task(begin(gate, said)) for gate in (ours, others)]
        await suspended(*builds)
        assert said == []
    await until(lambda: said)
    await suspended(*builds)
    assert said == ["collecting"]
    ending.set()
    await asyncio.gather(collector, *builds)
    assert said == ["collecting", "collected", "begun", "begun"]


async def test_a_build_that_goes_on_for_long_has_begun_after_a_while(tmp_path: Path) -> None:
    gate, said = StoreLock(tmp_path, 0.0), list[str]()
    async with asyncio.timeout(5), gate.beginning() as passage:
        passage.realising()
        passage.realising()
        await collect(gate, said)
    assert said == ["collecting", "collected"]


async def test_a_build_that_fails_or_is_cancelled_leaves_the_gate_free(tmp_path: Path) -> None:
    gate, passages = StoreLock(tmp_path, 1000), list[Reader]()

    async def build() -> None:
        async with gate.beginning() as passage:
            passage.realising()
            passages.append(passage)
            await asyncio.Event().wait()

    task = asyncio.create_task(build())
    await until(lambda: passages)
    task.cancel()
    async with asyncio.timeout(5):
        await collect(gate, [])
