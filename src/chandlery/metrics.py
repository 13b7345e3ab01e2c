"""What a server counts, for Prometheus (prometheus.io, "Metric and label naming").

Every value of a label is one of few that this program knows: names, tags and methods that a client makes up
never become labels, so the number of time series has a bound.
"""

from collections.abc import Callable, Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

from chandlery import __version__

Cache = Literal["image", "layer", "resolution"]

_CACHES: tuple[Cache, ...] = ("image", "layer", "resolution")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Seconds. A request is held for up to half a minute, a build may take an hour.
_REQUEST_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)
_BUILD_BUCKETS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """The figures of one server; every instance has a registry of its own."""

    def __init__(self) -> None:
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

    def gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Add a figure that is read whenever somebody looks; reading it must be cheap."""
        Gauge(name, description, registry=self._registry).set_function(read)

    def answered(self, route: str, method: str, status: int | None, seconds: float, size: int) -> None:
        """Count a request and the bytes of its response; `status` is None if there was no response."""
        method = method if method in _METHODS else "other"
        self._requests.labels(route, method, str(status or "none")).inc()
        self._request_seconds.labels(route, method).observe(seconds)
        self._response_bytes.labels(route).inc(size)

    def built(self, state: str, seconds: float, steps: Iterable[tuple[str, float]]) -> None:
        """Count a build that has ended, and how many seconds each step took."""
        self._build_seconds.labels(state).observe(seconds)
        for step, duration in steps:
            self._step_seconds.labels(step).observe(duration)

    def looked_up(self, cache: Cache, *, hits: int = 0, misses: int = 0) -> None:
        """Count what was known and what was not."""
        self._lookups.labels(cache, "hit").inc(hits)
        self._lookups.labels(cache, "miss").inc(misses)

    def packed(self, size: int) -> None:
        """Count the bytes of a layer that was packed."""
        self._packed_bytes.inc(size)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Give all figures as text, in a format that `accept` takes, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type
