"""The logs of builds, of which the newest are kept.

    <folder>/<id>.log         what Nix said in a build (`nix.build_log`)
    <folder>/<key>.building   the id of a build that runs (`builds.locks`)

The log of a build that runs is kept, in whatever process it does.
"""

import asyncio
from contextlib import suppress
from pathlib import Path

from chandlery.machine.age import age_of

_MOST_BYTES = 1 << 30


class BuildLogs:
    """The logs in a folder, of which `most` are kept, and so many of them as have `most_bytes` together."""

    def __init__(self, folder: Path, most: int, most_bytes: int = _MOST_BYTES) -> None:
        self._folder = folder
        self._most = most
        self._most_bytes = most_bytes

    def file(self, build_id: str) -> Path:
        """Return where the log of a build is; `build_id` is trusted to be one."""
        return self._folder / f"{build_id}.log"

    async def trim(self) -> None:
        """Remove the oldest, as far as there are too many."""
        await asyncio.to_thread(self._trim)

    def _trim(self) -> None:
        running = set[str]()
        for file in self._folder.glob("*.building"):
            with suppress(OSError):
                running.add(file.read_text(errors="replace"))
        total = 0
        for number, log in enumerate(sorted(self._folder.glob("*.log"), key=age_of)):
            with suppress(OSError):
                total += log.stat().st_size
                if (number >= self._most or total > self._most_bytes) and log.stem not in running:
                    log.unlink()
