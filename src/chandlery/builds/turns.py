"""Whose turn it is: clients take turns, however many things each of them waits for. No I/O.

What several clients wait for comes with the first of their turns. If client a waits for 1, 2 and 3, and then
b for 3 and 4, the order is 1 (of a), 3 (of b), 2 (of a), 4 (of b).
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """What waits for its turn, and the clients that it has turns of; what waits is compared by `==`."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, list[T]] = OrderedDict()  # by client, the one that is next first
        # By what waits, the oldest first; as sets that have an order.
        self._clients: dict[T, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[T]:
        """Yield what waits, in the order of turns: one of each client, then again."""
        queues = list(map(list, self._queues.values()))
        yielded = set[T]()
        for number in range(max(map(len, queues), default=0)):
            for queue in queues:
                if number < len(queue) and queue[number] not in yielded:
                    yielded.add(queue[number])
                    yield queue[number]

    @property
    def heads(self) -> dict[str, T]:
        """What each client has its next turn with; the client whose turn is next comes first."""
        return {client: queue[0] for client, queue in self._queues.items()}

    def clients(self, item: T) -> Collection[str]:
        """Return the clients that something has turns of; none if it doesn't wait."""
        return tuple(self._clients.get(item, ()))

    def join(self, client: str, item: T) -> None:
        """Give something the turns of a client, after all that the client waits for already."""
        clients = self._clients.setdefault(item, {})
        if client not in clients:
            clients[client] = None
            self._queues.setdefault(client, []).append(item)

    def leave(self, client: str, item: T) -> None:
        """Take the turns of a client from something, unless it has no other client's."""
        clients = self._clients.get(item, {})
        if client in clients and len(clients) > 1:
            del clients[client]
            self._drop(client, item)

    def remove(self, item: T) -> None:
        """Let something wait no longer."""
        for client in self._clients.pop(item, ()):
            self._drop(client, item)

    def took(self, client: str) -> None:
        """Note that a client has had its turn: the others come first."""
        if client in self._queues:
            self._queues.move_to_end(client)

    def gives_way_to(self, client: str, running: Mapping[str, int], exempt: Collection[str] = ()) -> T | None:
        """Return what should wait no longer so that a client may wait for one thing more.

        It is the newest thing of the client that has most, including what is `running` of it. That client
        must have no fewer than the other afterwards, so that no two displace each other for ever. None if
        there is no such thing; what has turns of an `exempt` client stays.
        """

        def load(each: str) -> int:
            return len(self._queues.get(each, ())) + running.get(each, 0)

        least = load(client) + 2
        found = None
        for item, clients in self._clients.items():
            lightest = min(map(load, clients))
            if lightest >= least and not any(each in exempt for each in clients):
                found, least = item, lightest
        return found

    def _drop(self, client: str, item: T) -> None:
        queue = self._queues[client]
        queue.remove(item)
        if not queue:
            del self._queues[client]
