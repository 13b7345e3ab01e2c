"""A clock that goes when a test says so."""


class Clock:
    """Seconds; the time is `now`."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
