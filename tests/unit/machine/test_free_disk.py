import asyncio
from pathlib import Path
from typing import NoReturn

import pytest

from chandlery.errors import BuildError, LowDiskError
from chandlery.machine.free_disk import free_bytes, stopped_by, watch_free_disk


def test_a_folder_that_is_not_there_yet_has_what_is_free_above_it(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a/b") > 0


async def test_what_runs_is_stopped_when_too_little_is_left(tmp_path: Path) -> None:
    with pytest.raises(LowDiskError) as stopped:
        async with stopped_by(watch_free_disk(tmp_path, 1 << 60, interval=0.0)):
            await asyncio.Event().wait()
    assert 0 < stopped.value.free < stopped.value.least == 1 << 60


async def test_what_ends_before_ends_as_without_a_watch(tmp_path: Path) -> None:
    watch = watch_free_disk(tmp_path, 1, interval=0.0)
    async with stopped_by(watch):
        await asyncio.sleep(0)
    with pytest.raises(BuildError) as failed:
        async with stopped_by(watch_free_disk(tmp_path, 1, interval=0.0)):
            raise BuildError("git", "no", []) from ValueError("why")
    assert isinstance(failed.value.__cause__, ValueError)


async def test_who_is_cancelled_from_outside_is_cancelled(tmp_path: Path) -> None:
    async def never() -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    async def body() -> None:
        async with stopped_by(never()):
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
