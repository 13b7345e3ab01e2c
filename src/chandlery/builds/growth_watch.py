"""Stops a build that writes more than one may, while Nix fetches and builds.

What Nix has registered its database tells, and what is being written has to be added up file by file. So that
this costs nothing that is felt, only the disk is asked often how much is free, which is one call of the
system: as long as it has lost less than a build may write, this one has kept to it. When it has lost more,
and seldom otherwise, since what is deleted hides what is written, it is looked what this build has added.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from chandlery.builds.limits import BuildLimits
from chandlery.builds.speculative_packing import Progress, bytes_there
from chandlery.machine.free_disk import free_bytes
from chandlery.nix.nix import Nix

# Seconds between looks at the disk, and between those at the build itself, at most.
_INTERVAL, _LOOK_INTERVAL = 0.25, 30.0
# How much longer than a look the time to the next one is.
_PAUSE = 20.0


@dataclass(frozen=True, slots=True)
class GrowthWatch:
    """Watches builds; `interval` is in seconds, and `free` tells the bytes that a folder's disk has left."""

    limits: BuildLimits
    interval: float = _INTERVAL
    clock: Callable[[], float] = time.monotonic
    free: Callable[[Path], int] = free_bytes

    async def watch(
        self, image: str, nix: Nix, derivation: str, since: int, scratch: Path, progress: Progress
    ) -> NoReturn:
        """Raise `BuildTooLargeError` when what a derivation needs is too much.

        `since` is what `nix.newest` said before it was built, `scratch` is where its builders work, and
        `progress` knows what the image will hold.
        """
        begin = self.free(nix.store_root)
        looked, pause = self.clock(), 0.0
        while True:
            await asyncio.sleep(self.interval)
            passed = self.clock() - looked
            lost = begin - self.free(nix.store_root)
            if passed < pause or (lost <= self.limits.least_watched and passed < _LOOK_INTERVAL):
                continue
            began = self.clock()
            there = await bytes_there(progress)
            self.limits.check_progress(image, there, await nix.added([derivation], since, scratch))
            looked = self.clock()
            pause = _PAUSE * (looked - began)
