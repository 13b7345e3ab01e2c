"""What a server counts, for Prometheus (prometheus.io, "Metric and label naming").

Every value of a label is one of few that this program knows: names, tags and methods that a client makes up
never become labels, so the number of time series has a bound.

Several workers count each for itself, in memory; `Figures` are what one tells the others, and `exposition`
adds them up (decision 9).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from chandlery import __version__

Cache = Literal["image", "layer", "resolution"]

_CACHES: tuple[Cache, ...] = ("image", "layer", "resolution")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Seconds. A request is held for up to half a minute, a build may take an hour.
_REQUEST_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)
_BUILD_BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


# Gauges that are of each process, and so add up.
_OF_PROCESSES = frozenset(
    {"process_virtual_memory_bytes", "process_resident_memory_bytes", "process_open_fds"}
)

Samples = list[tuple[str, dict[str, str], float]]


class Figures(msgspec.Struct, frozen=True):
    """What one process has counted: samples (name, labels, value) by the name of what they are of.

    `totals` never become less, `levels` are what is now and ends with the process.
    """

    totals: dict[str, Samples]
    levels: dict[str, Samples]

    def of(self, family: str) -> Samples:
        """Return the samples of one name."""
        return self.totals.get(family) or self.levels.get(family) or []


class Metrics:
    """The figures of one process; every instance has a registry of its own."""

    def __init__(self) -> None:
        self._summed = set(_OF_PROCESSES)
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("chandlery", "Which Chandlery this is.", registry=registry).info({"version": __version__})
        self._requests = Counter(
            "chandlery_requests",
            "Requests, by what they were for.",
            ["route", "method", "status"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "chandlery_request_duration_seconds",
            "Time until the server was done with a request; files that it sends itself go on longer.",
            ["route", "method"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._response_bytes = Counter(
            "chandlery_response_bytes",
            "Bytes of response bodies; the route blob has those of layers.",
            ["route"],
            registry=registry,
        )
        self._build_seconds = Histogram(
            "chandlery_build_duration_seconds",
            "Time from when a build was asked for to its end, by how it ended.",
            ["state"],
            buckets=_BUILD_BUCKETS,
            registry=registry,
        )
        self._step_seconds = Histogram(
            "chandlery_build_step_duration_seconds",
            "Time that the steps of builds took; queued is the wait before the first.",
            ["step"],
            buckets=_BUILD_BUCKETS,
            registry=registry,
        )
        self._work_seconds = Histogram(
            "chandlery_build_work_duration_seconds",
            "Time for which builds resolved, fetched, built, packed and stored; these overlap.",
            ["work"],
            buckets=_BUILD_BUCKETS,
            registry=registry,
        )
        self._lookups = Counter(
            "chandlery_cache_lookups",
            "Whether what was needed was known: images, layers, and what attribute paths resolve to.",
            ["cache", "result"],
            registry=registry,
        )
        self._packed_bytes = Counter(
            "chandlery_packed_bytes", "Bytes of the layers that were packed, compressed.", registry=registry
        )
        for cache in _CACHES:
            self.looked_up(cache)
        # Finding the series of a request takes longer than counting it.
        self._series: dict[tuple[str, str, int | None], tuple[Counter, Histogram, Counter]] = {}

    def gauge(self, name: str, description: str, read: Callable[[], float], *, summed: bool = False) -> None:
        """Add a figure that is read whenever somebody looks; reading it must be cheap.

        Of several processes it is the sum, or else that of the one which is asked.
        """
        if summed:
            self._summed.add(name)
        Gauge(name, description, registry=self._registry).set_function(read)

    def answered(self, route: str, method: str, status: int | None, seconds: float, size: int) -> None:
        """Count a request and the bytes of its response; `status` is None if there was no response."""
        series = self._series.get((route, method, status))
        if series is None:
            known = method if method in _METHODS else "other"
            series = (
                self._requests.labels(route, known, str(status or "none")),
                self._request_seconds.labels(route, known),
                self._response_bytes.labels(route),
            )
            if known == method:
                self._series[route, method, status] = series
        requests, durations, sizes = series
        requests.inc()
        durations.observe(seconds)
        sizes.inc(size)

    def built(
        self,
        state: str,
        seconds: float,
        steps: Iterable[tuple[str, float]],
        works: Iterable[tuple[str, float]] = (),
    ) -> None:
        """Count a build that has ended, and how many seconds each step took, and each work of it."""
        self._build_seconds.labels(state).observe(seconds)
        for step, duration in steps:
            self._step_seconds.labels(step).observe(duration)
        for work, duration in works:
            self._work_seconds.labels(work).observe(duration)

    def looked_up(self, cache: Cache, *, hits: int = 0, misses: int = 0) -> None:
        """Count what was known and what was not."""
        self._lookups.labels(cache, "hit").inc(hits)
        self._lookups.labels(cache, "miss").inc(misses)

    def packed(self, size: int) -> None:
        """Count the bytes of a layer that was packed."""
        self._packed_bytes.inc(size)

    def figures(self) -> Figures:
        """Give what other processes need to know to add it to theirs."""
        totals: dict[str, Samples] = {}
        levels: dict[str, Samples] = {}
        for family in self._registry.collect():
            samples = [(each.name, dict(each.labels), each.value) for each in family.samples]
            if family.type in ("counter", "histogram"):
                totals[family.name] = samples
            elif family.name in self._summed:
                levels[family.name] = samples
        return Figures(totals, levels)

    def exposition(self, accept: str, others: Iterable[Figures] = ()) -> tuple[bytes, str]:
        """Return all figures as text, with those of other processes, in a format that `accept` takes.

        The second is its media type.
        """
        encode, media_type = choose_encoder(accept)
        return encode(_Sum(self._registry, list(others))), media_type


class _Sum(Collector):
    """What a registry has, and others have of the same."""

    def __init__(self, registry: CollectorRegistry, others: Iterable[Figures]) -> None:
        self._registry = registry
        self._others = others

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            for figures in self._others:
                _add(family, figures.of(family.name))
            yield family


def _add(family: Metric, samples: Samples) -> None:
    together = {(each.name, *sorted(each.labels.items())): each for each in family.samples}
    for name, labels, value in samples:
        key = (name, *sorted(labels.items()))
        if key in together:
            known = together[key].value
            # When a series began is no amount.
            value = min(known, value) if name.endswith("_created") else known + value
        together[key] = Sample(name, labels, value)
    family.samples = list(together.values())
