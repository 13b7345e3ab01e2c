import math

from prometheus_client.parser import text_string_to_metric_families

from chandlery.telemetry.metrics import Metrics
from tests.support.samples import values


def test_what_is_counted_is_shown() -> None:
    metrics = Metrics()
    metrics.answered("manifest", "GET", 200, 0.02, 700)
    metrics.answered("blob", "GET", 200, 0.02, 1000)
    metrics.answered("blob", "GET", 206, 0.02, 24)
    metrics.built("finished", 70.0, [("queued", 1.0), ("pack", 9.0)], [("fetch", 5.0)])
    metrics.looked_up("resolution", hits=3, misses=2)
    metrics.packed(4096)
    shown = values(metrics)
    assert shown["chandlery_requests_total", "GET", "blob", "206"] == 1
    assert shown["chandlery_request_duration_seconds_count", "GET", "blob"] == 2
    assert shown["chandlery_response_bytes_total", "blob"] == 1024
    assert shown["chandlery_build_duration_seconds_count", "finished"] == 1
    assert shown["chandlery_build_duration_seconds_bucket", "60.0", "finished"] == 0
    assert shown["chandlery_build_duration_seconds_bucket", "120.0", "finished"] == 1
    assert shown["chandlery_build_step_duration_seconds_sum", "pack"] == 9
    assert shown["chandlery_build_work_duration_seconds_sum", "fetch"] == 5
    assert shown["chandlery_cache_lookups_total", "resolution", "hit"] == 3
    assert shown["chandlery_cache_lookups_total", "resolution", "miss"] == 2
    assert shown["chandlery_packed_bytes_total",] == 4096
    assert shown["process_resident_memory_bytes",] > 0


def test_a_gauge_is_read_when_somebody_looks() -> None:
    metrics = Metrics()
    length = 3
    metrics.gauge("chandlery_example", "An example.", lambda: length)
    assert values(metrics)["chandlery_example",] == 3
    length = 5
    assert values(metrics)["chandlery_example",] == 5


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.packed(1)
    assert values(other)["chandlery_packed_bytes_total",] == 0


def test_methods_that_clients_make_up_are_one_label() -> None:
    metrics = Metrics()
    metrics.answered("other", "GET", 404, 0.0, 0)
    metrics.answered("other", "BREW0", 405, 0.0, 0)
    before = len(values(metrics))
    for number in range(100):
        metrics.answered("other", f"BREW{number}", 405, 0.0, 0)
    assert len(values(metrics)) == before
    assert values(metrics)["chandlery_requests_total", "other", "other", "405"] == 101


def test_a_request_without_a_response_is_counted() -> None:
    metrics = Metrics()
    metrics.answered("manifest", "GET", None, 1.0, 0)
    assert values(metrics)["chandlery_requests_total", "GET", "manifest", "none"] == 1


def test_caches_are_shown_before_they_are_used() -> None:
    shown = values(Metrics())
    for cache in ("image", "layer", "resolution"):
        assert shown["chandlery_cache_lookups_total", cache, "hit"] == 0


def test_figures_are_named_and_described_as_prometheus_wants() -> None:
    metrics = Metrics()
    metrics.answered("blob", "GET", 200, 0.5, 1)
    metrics.built("finished", 1.0, [("pack", 1.0)])
    families = list(text_string_to_metric_families(metrics.exposition("")[0].decode()))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        assert not any(math.isnan(sample.value) for sample in family.samples)
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        if family.name.startswith("chandlery_"):
            labels = {label for sample in family.samples for label in sample.labels}
            assert labels <= {
                "cache",
                "le",
                "method",
                "result",
                "route",
                "state",
                "status",
                "step",
                "version",
            }


def test_who_takes_open_metrics_gets_it() -> None:
    text, media_type = Metrics().exposition("application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
