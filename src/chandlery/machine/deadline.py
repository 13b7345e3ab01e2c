"""A moment until which something is awaited: made once, where a request comes in, and passed on."""

import math
import time
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment in seconds of `time.monotonic`, which is the clock of event loops; infinity for none."""

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float | None) -> Self:
        """Return the deadline so many seconds from now; None means no deadline."""
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    @property
    def left(self) -> float | None:
        """Seconds that are left, at least 0; None if there is no deadline: a timeout, as asyncio has it."""
        return None if math.isinf(self.at) else max(0.0, self.at - time.monotonic())


NO_DEADLINE = Deadline()
