"""What failed a moment ago isn't tried again at once, however many ask for it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cachetools import LRUCache

from chandlery.errors import ChandleryError, ReferenceNotFoundError, TooManyReferencesError
from chandlery.machine.token_buckets import TokenBuckets

# What is remembered at most.
_MOST = 1024


class NegativeCache:
    """How things failed within the last `seconds`, by name; those that failed or were asked for last.

    `clock` may be set back (so a cache with times to live in it isn't enough): that ends what is remembered.
    """

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._failed: LRUCache[str, tuple[float, ChandleryError]] = LRUCache(_MOST)

    def __len__(self) -> int:
        return len(self._failed)

    def get(self, what: str) -> ChandleryError | None:
        """Return how this failed lately; None if it didn't."""
        failed = self._failed.get(what)
        if failed is None or not 0 <= self._clock() - failed[0] < self._seconds:
            return None
        return failed[1]

    def note(self, what: str, error: ChandleryError) -> None:
        """Remember how this has just failed."""
        self._failed[what] = self._clock(), error

    def forget(self, what: str) -> None:
        """Let this be tried again: it didn't fail."""
        self._failed.pop(what, None)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Raise how this failed lately, or remember how the body fails."""
        failed = self.get(what)
        if failed is not None:
            raise failed
        try:
            yield
        except ChandleryError as error:
            self.note(what, error)
            raise
        self.forget(what)


class MissingReferences:
    """References that upstream hasn't: each is asked for once in `seconds`, and few of them in a minute."""

    def __init__(
        self,
        source: str,
        *,
        seconds: float = 60.0,
        per_minute: int = 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._per_minute = per_minute
        self._clock = clock
        self._missing = NegativeCache(seconds, clock=clock)
        self._buckets = TokenBuckets(60.0, most_clients=1, clock=clock)
        self._closed_until = float("-inf")

    def __len__(self) -> int:
        return len(self._missing)

    def check(self, reference: str) -> None:
        """Raise what was answered lately, or `TooManyReferencesError` after too many other references."""
        error = self._missing.get(reference)
        if error is not None:
            raise error
        if self._clock() < self._closed_until:
            raise TooManyReferencesError(self._source)

    def note(self, reference: str, error: ReferenceNotFoundError) -> None:
        """Remember that upstream was asked for a reference, and doesn't have it."""
        self._missing.note(reference, error)
        if self._buckets.take("", self._per_minute):
            self._closed_until = self._clock() + 60.0 / self._per_minute
