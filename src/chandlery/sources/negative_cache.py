"""What failed a moment ago isn't tried again at once, however many ask for it."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chandlery.errors import ChandleryError

# What is remembered at most.
_MOST = 1024


class FailureMemory:
    """Remembers for `seconds` how something failed."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._failed: OrderedDict[str, tuple[float, ChandleryError]] = OrderedDict()

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Raise how this failed lately, or remember how the body fails."""
        failed = self._failed.get(what)
        if failed is not None and self._clock() < failed[0]:
            raise failed[1]
        try:
            yield
        except ChandleryError as error:
            self._failed[what] = (self._clock() + self._seconds, error)
            self._failed.move_to_end(what)
            if len(self._failed) > _MOST:
                self._failed.popitem(last=False)
            raise
        self._failed.pop(what, None)
