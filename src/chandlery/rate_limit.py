"""How often a client may do something: a token bucket for each, which costs two numbers and no timer.

A bucket holds as many tokens as may be used in a period, and fills evenly. All that is kept of it is when it
will be full (the generic cell rate algorithm, ITU-T I.371): a client that isn't known has a full one, so
the clients that did nothing for longest can be forgotten.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_CLIENTS = 10_000


class TokenBuckets:
    """Buckets by client that fill in `period` seconds; at most `most_clients` are remembered."""

    def __init__(
        self,
        period: float,
        *,
        most_clients: int = _MOST_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._period = period
        self._most_clients = most_clients
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, client: str, limit: int) -> float:
        """Take one of a client's `limit` tokens: 0.0 if there was one, else in how many seconds there is."""
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now) + self._period / limit
        wait = full_at - now - self._period
        # A sum of fractions may be a little more than the whole.
        if wait > self._period * 1e-6:
            return wait
        self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        if len(self._full_at) > self._most_clients:
            self._full_at.popitem(last=False)
        return 0.0
