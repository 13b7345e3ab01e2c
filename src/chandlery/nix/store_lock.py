"""A readers-writer lock of one Nix store: it keeps Nix's garbage collector apart from builds that begin.

A build notes path by path what it finds in the store and needs. A collector that is just running learns of
it, but Nix 2.8's may have decided about a path by then, and deletes it all the same: builds have been seen to
lose what they had found. A build that has noted everything is safe, however long it takes. So builds hold the
lock while they begin, as readers, any number at once; a collector is a writer: it waits until none holds it,
and lets none in meanwhile.

    gate/         locked by a collector, and for a moment by a build that begins: so a collector has its turn
    gate/inside/  locked by builds that begin, together, or by a collector, alone
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from chandlery.machine.disk_errors import storage_errors
from chandlery.machine.locks import holding


class Reader:
    """A build that begins; it holds the lock until it ends, or for a while after `realising`."""

    def __init__(self, begun_after: float = 0.0) -> None:
        self.held = AsyncExitStack()  # what is locked meanwhile
        self._begun_after = begun_after
        self._releasing: asyncio.Task[None] | None = None

    def realising(self) -> None:
        """Release the lock after the time in which Nix notes all that the build needs."""
        if self._releasing is None:
            self._releasing = asyncio.create_task(self._release_later())

    async def release(self) -> None:
        """Release the lock; once is enough."""
        if self._releasing is not None:
            self._releasing.cancel()
            await asyncio.gather(self._releasing, return_exceptions=True)
        await self.held.aclose()

    async def _release_later(self) -> None:
        await asyncio.sleep(self._begun_after)
        await self.held.aclose()


class StoreLock:
    """The lock of one Nix store, for all processes that use it; its files stand in `folder`.

    A build has begun when Nix has been building it for `begun_after` seconds.
    """

    def __init__(self, folder: Path, begun_after: float) -> None:
        self._begun_after = begun_after
        self._gate = folder / "gate"
        self._inside = self._gate / "inside"

    @asynccontextmanager
    async def beginning(self) -> AsyncIterator[Reader]:
        """Keep collectors out while a build begins, at the latest until the body ends."""
        self._make()
        reader = Reader(self._begun_after)
        async with holding(self._gate):
            await reader.held.enter_async_context(holding(self._inside, shared=True))
        try:
            yield reader
        finally:
            await reader.release()

    @asynccontextmanager
    async def collecting(self) -> AsyncIterator[None]:
        """Wait until all builds that begin have begun, and keep others from beginning."""
        self._make()
        async with holding(self._gate), holding(self._inside):
            yield

    def _make(self) -> None:
        with storage_errors(self._gate):
            self._inside.mkdir(parents=True, exist_ok=True)
