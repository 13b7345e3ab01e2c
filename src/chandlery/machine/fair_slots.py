"""So many at once, and turns for the others: whoever asks for much waits behind itself, and not the others.

Each client has a line of its own, and a slot that is free goes to the first of the next line. Where too many
wait, the last of the longest line gives way: one client can't keep the others from waiting.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class NoRoomError(Exception):
    """Too many wait already, and most of them are of this client."""


class FairSlots:
    """`slots` for one event loop; at most `most_waiting` wait, and as many of those who go first."""

    def __init__(self, slots: int, most_waiting: int) -> None:
        self._free = slots
        self._first, self._others = _Lines(most_waiting), _Lines(most_waiting)

    @asynccontextmanager
    async def slot(self, client: str, *, first: bool = False) -> AsyncIterator[None]:
        """Hold a slot; who goes `first` has one before all others. Raises `NoRoomError`."""
        if self._free:
            self._free -= 1
        else:
            lines = self._first if first else self._others
            turn = lines.join(client)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.cancelled():
                    lines.leave(client, turn)
                elif turn.exception() is None:
                    # It was its turn just now.
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        turn = self._first.next() or self._others.next()
        if turn:
            turn.set_result(None)
        else:
            self._free += 1


class _Lines:
    """Who waits, by client, in the order in which clients have their turns."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    def join(self, client: str) -> "asyncio.Future[None]":
        """Return what is done when it is this one's turn. Raises `NoRoomError`, here or there."""
        if sum(map(len, self._waiting.values())) >= self._most:
            longest = max(self._waiting.values(), key=len)
            # Where this one would make its line as long, nobody has to give way to it.
            if len(longest) <= len(self._waiting.get(client, ())) + 1:
                raise NoRoomError
            longest.pop().set_exception(NoRoomError())
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        return turn

    def leave(self, client: str, turn: "asyncio.Future[None]") -> None:
        """Forget one that waits no longer."""
        line = self._waiting.get(client, deque())
        with suppress(ValueError):
            line.remove(turn)
        if not line:
            self._waiting.pop(client, None)

    def next(self) -> "asyncio.Future[None] | None":
        """Return the turn that is next, None if nobody waits; its client is the last from now on."""
        while self._waiting:
            client = next(iter(self._waiting))
            line = self._waiting.pop(client)
            turn = line.popleft()
            if line:
                self._waiting[client] = line
            # A task that was cancelled has not run yet since then.
            if not turn.done():
                return turn
        return None
