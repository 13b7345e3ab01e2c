"""Layers that are packed while Nix still makes what other layers hold.

Nix waits for mirrors, and builds one package after another where they need each other; a processor that is
idle meanwhile can pack. What shares a layer is known only when the whole closure is there, with all sizes.
But a large group whose store paths are all there is mostly a layer of the image: so the closure as it will be
is planned again and again, and such groups are packed. One that is none in the end has cost time, and no
bytes of the image: the final plan decides alone.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from chandlery.nix.closure import Closure, StorePath
from chandlery.oci.documents import PackedLayer
from chandlery.plan.strategies import LayerGroup

# Seconds between looks at what is there.
_INTERVAL = 0.5
# Bytes: smaller groups may be part of a tail in the end, and are packed in no time.
_LARGE = 1 << 20

# What will be in an image, as far as can be told, and what of it is there; None if nothing can.
Expected = Callable[[], Awaitable[tuple[Closure, frozenset[StorePath]] | None]]


class EarlyLayers:
    """The layers of one image; enter it before Nix is called, and leave it when all layers are packed."""

    def __init__(
        self,
        plan: Callable[[Closure], Sequence[LayerGroup]],
        pack: Callable[[LayerGroup], Coroutine[Any, Any, PackedLayer]],
    ) -> None:
        self._plan = plan
        self._pack = pack
        self._packing: dict[LayerGroup, asyncio.Task[PackedLayer]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop packing what nobody has asked for."""
        await _stopped(*self._packing.values())

    @asynccontextmanager
    async def watching(self, expected: Expected) -> AsyncIterator[None]:
        """Pack what is there already, as long as the body runs."""
        watch = asyncio.create_task(self._watch(expected))
        try:
            yield
        finally:
            await _stopped(watch)

    async def layer(self, group: LayerGroup) -> PackedLayer:
        """Give a layer of the final plan; one that isn't packed yet, nor being packed, is packed now."""
        early = self._packing.pop(group, None)
        # Who waits for a task and is cancelled cancels it.
        return await (self._pack(group) if early is None else early)

    @property
    def begun(self) -> int:
        """How many layers were begun early."""
        return len(self._packing)

    async def _watch(self, expected: Expected) -> None:
        seen: frozenset[StorePath] = frozenset()
        while True:
            await asyncio.sleep(_INTERVAL)
            found = await expected()
            if found is None:
                return
            closure, there = found
            if there == seen:
                continue
            seen = there
            for group in await asyncio.to_thread(self._plan, closure):
                is_there = group.nar_size >= _LARGE and there.issuperset(group.store_paths)
                if is_there and group not in self._packing:
                    self._packing[group] = asyncio.create_task(self._pack(group))


async def _stopped(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks, and wait until they have ended; how is of no interest."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
