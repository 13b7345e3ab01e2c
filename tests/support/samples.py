"""What metrics show, read back."""

from prometheus_client.parser import text_string_to_metric_families

from chandlery.telemetry.metrics import Metrics


def values(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Return every sample by its name and the values of its labels, in the order of the labels' names."""
    text, media_type = metrics.exposition("")
    assert media_type.startswith("text/plain")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
