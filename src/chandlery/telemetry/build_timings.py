"""When a build did what: works that overlap, each from when to when, and how long it was under way."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum


class Work(StrEnum):
    """What a build consists of, in the order in which it begins."""

    RESOLVE = "resolve"  # from names to derivations
    FETCH = "fetch"  # downloads of Nix
    BUILD = "build"  # Nix's builders, without those that fetch
    PACK = "pack"  # layers
    STORE = "store"  # blobs


@dataclass(frozen=True, slots=True)
class WorkTime:
    """In seconds since the build began: from when to when, and for how long something was under way."""

    work: Work
    begin: float
    end: float
    busy: float


@dataclass(slots=True)
class Timings:
    """The works of one build; several of a kind may be under way at once."""

    _began: float = field(default_factory=time.monotonic)
    _spans: dict[Work, list[tuple[float, float]]] = field(default_factory=dict)

    @contextmanager
    def during(self, work: Work) -> Iterator[None]:
        """Note that a work lasts as long as the body, however that ends."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(work, begin, time.monotonic())

    def add(self, work: Work, begin: float, end: float) -> None:
        """Note a span of a work, in seconds of `time.monotonic`."""
        self._spans.setdefault(work, []).append((begin - self._began, end - self._began))

    def times(self) -> list[WorkTime]:
        """Return the times of each work that there was; spans that overlap count once."""
        return [_time_of(work, sorted(self._spans[work])) for work in Work if work in self._spans]


def _time_of(work: Work, spans: list[tuple[float, float]]) -> WorkTime:
    busy, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return WorkTime(work, round(spans[0][0], 3), round(until, 3), round(busy, 3))
