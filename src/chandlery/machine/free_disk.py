"""How much of a disk is free, and what goes on only as long as enough is."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NoReturn

from chandlery.errors import LowDiskError

# Seconds between looks, one call of the system each (statvfs).
_INTERVAL = 0.25


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or will be made."""
    for each in (folder, *folder.parents):
        with suppress(FileNotFoundError):
            return shutil.disk_usage(each).free
    return 0


async def watch_free_disk(folder: Path, least: int, interval: float = _INTERVAL) -> NoReturn:
    """Raise `LowDiskError` as soon as fewer than `least` bytes are free where a folder is."""
    while True:
        await asyncio.sleep(interval)
        free = free_bytes(folder)
        if free < least:
            raise LowDiskError(str(folder), free, least)


@asynccontextmanager
async def stopped_by(watch: Coroutine[None, None, NoReturn]) -> AsyncIterator[None]:
    """Run the body to its end, unless the watch raises something before: then it is cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch)
            yield
            watching.cancel()
    except BaseExceptionGroup as failed:
        first = failed.exceptions[0]
        raise first from first.__cause__
