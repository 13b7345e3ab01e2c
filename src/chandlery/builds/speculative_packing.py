"""Layers that are packed while Nix still makes what other layers hold.

Nix waits for mirrors, and builds one package after another where they need each other; a processor that is
idle meanwhile can pack. What shares a layer is known only when the whole closure is there, with all sizes.
But a large group whose store paths are all there is mostly a layer of the image: so the closure as it will be
is planned again and again, and such groups are packed. One that is none in the end has cost time, and no
bytes of the image: the final plan decides alone.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from chandlery.builds.job import Job
from chandlery.nix.closure import Closure, StorePath
from chandlery.nix.nix import Nix, Resolution
from chandlery.oci.documents import PackedLayer
from chandlery.plan.layer_group import LayerGroup

# Seconds.
_INTERVAL = 0.5
# Bytes: smaller groups may be part of a tail in the end, and are packed in no time.
_LARGE = 1 << 20


class Packer(Protocol):
    """What packs layers; see `LayerPacker`."""

    async def pack(self, job: Job, group: LayerGroup) -> PackedLayer:
        """Return a group's layer, packing it unless it is known."""
        ...


class Progress(Protocol):
    """How far the making of an image's store paths has come."""

    async def look(self) -> tuple[Closure, frozenset[StorePath]] | None:
        """Return what will be in the image, as far as is known, and what of it is there; None if unknown."""
        ...


async def bytes_there(progress: Progress) -> int:
    """Return the bytes that are there already and will be in the image; 0 if unknown."""
    found = await progress.look()
    if found is None:
        return 0
    closure, there = found
    return sum(node.nar_size for node in closure.nodes if node.path in there)


@dataclass(frozen=True, slots=True)
class NixProgress:
    """What Nix has made of some packages; see `Progress`.

    Packages of the Debian set (`builders_are_own`) need all that they are made of, so their derivations tell
    what will be there; of others only what is there is known.
    """

    nix: Nix
    resolutions: Iterable[Resolution]
    builders_are_own: bool

    async def look(self) -> tuple[Closure, frozenset[StorePath]] | None:
        """See `Progress`."""
        if self.builders_are_own:
            return await self.nix.made_by(sorted({each.derivation for each in self.resolutions}))
        closure = await self.nix.known_closure(sorted({each.store_path for each in self.resolutions}))
        return None if closure is None else (closure, frozenset(node.path for node in closure.nodes))


class SpeculativePacking:
    """The layers of one image; enter it before Nix is called, and leave it when all layers are packed.

    `interval` is in seconds between looks at what is there.
    """

    def __init__(
        self,
        job: Job,
        packer: Packer,
        plan: Callable[[Closure], Sequence[LayerGroup]],
        interval: float = _INTERVAL,
    ) -> None:
        self._job = job
        self._packer = packer
        self._plan = plan
        self._interval = interval
        self._packing: dict[LayerGroup, asyncio.Task[PackedLayer]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop packing what nobody has asked for."""
        await _stopped(*self._packing.values())

    @asynccontextmanager
    async def watching(self, progress: Progress) -> AsyncIterator[None]:
        """Pack what is there already, as long as the body runs."""
        watch = asyncio.create_task(self._watch(progress))
        try:
            yield
        finally:
            await _stopped(watch)

    async def layer(self, group: LayerGroup) -> PackedLayer:
        """Return a layer of the final plan; one that isn't packed yet, nor being packed, is packed now."""
        begun = self._packing.pop(group, None)
        # Who waits for a task and is cancelled cancels it.
        return await (self._packer.pack(self._job, group) if begun is None else begun)

    @property
    def begun(self) -> int:
        """How many layers were begun early."""
        return len(self._packing)

    async def _watch(self, progress: Progress) -> None:
        seen: frozenset[StorePath] = frozenset()
        while True:
            await asyncio.sleep(self._interval)
            found = await progress.look()
            if found is None:
                return
            closure, there = found
            if there == seen:
                continue
            seen = there
            for group in await asyncio.to_thread(self._plan, closure):
                is_there = group.nar_size >= _LARGE and there.issuperset(group.store_paths)
                if is_there and group not in self._packing:
                    pack = self._packer.pack(self._job, group)
                    self._packing[group] = asyncio.create_task(pack)


async def _stopped(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks, and wait until they have ended; how is of no interest."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
