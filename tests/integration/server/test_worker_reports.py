import os
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from chandlery.server.worker_reports import Report, ReportedBuild, WorkerReports
from chandlery.telemetry.metrics import Metrics

BUILDS = [
    ReportedBuild(2.0, False, {"id": "runs", "state": "running"}),
    ReportedBuild(1.0, True, {"id": "ended", "state": "finished"}),
]


class Worker:
    """One worker: what it has counted, and its reports, as if it were a process of its own."""

    def __init__(self, folder: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.metrics = Metrics()
        self.running = 0
        self.metrics.gauge("chandlery_running_builds", "Builds that run.", lambda: self.running, summed=True)
        self.metrics.gauge("chandlery_disk_free_bytes", "Bytes that are free.", lambda: 7)
        monkeypatch.setattr(os, "getpid", lambda: number)
        self.reports = WorkerReports(folder, lambda: Report(self.metrics.figures(), BUILDS))

    def samples(self) -> dict[str, float]:
        text, _ = self.metrics.exposition("", [each.figures for each in self.reports.others()])
        return {
            f"{sample.name}{sorted(sample.labels.values())}": sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
        }


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Worker, Worker]:
    return Worker(tmp_path, 1, monkeypatch), Worker(tmp_path, 2, monkeypatch)


def test_whichever_worker_is_asked_tells_the_sum(workers: tuple[Worker, Worker]) -> None:
    first, second = workers
    first.metrics.answered("blob", "GET", 200, 0.01, 100)
    second.metrics.answered("blob", "GET", 200, 20.0, 1000)
    second.metrics.answered("manifest", "GET", 404, 0.01, 10)
    first.running, second.running = 1, 2
    for each in workers:
        each.reports.publish()
    told = first.samples()
    assert told["chandlery_requests_total['200', 'GET', 'blob']"] == 2
    assert told["chandlery_requests_total['404', 'GET', 'manifest']"] == 1
    assert told["chandlery_response_bytes_total['blob']"] == 1100
    assert told["chandlery_request_duration_seconds_bucket['0.025', 'GET', 'blob']"] == 1
    assert told["chandlery_request_duration_seconds_bucket['+Inf', 'GET', 'blob']"] == 2
    assert told["chandlery_running_builds[]"] == 3
    assert told["chandlery_disk_free_bytes[]"] == 7
    # Not twice what it is; and when counting began is no amount.
    created = {name: value for name, value in told.items() if "_created" in name}
    assert created
    assert all(value < time.time() + 1 for value in created.values())
    other = second.samples()
    counted = {name: value for name, value in told.items() if "_total" in name and "cpu" not in name}
    assert counted == {name: other[name] for name in counted}


def test_what_one_worker_tells_can_be_read_in_both_formats(workers: tuple[Worker, Worker]) -> None:
    workers[1].metrics.answered("blob", "GET", 200, 0.01, 100)
    workers[1].reports.publish()
    others = [each.figures for each in workers[0].reports.others()]
    text, _ = workers[0].metrics.exposition("application/openmetrics-text; version=1.0.0", others)
    assert text.endswith(b"# EOF\n")
    assert b'chandlery_requests_total{method="GET",route="blob",status="200"} 1.0' in text


def test_of_a_worker_that_has_gone_stays_what_it_has_counted(
    tmp_path: Path, workers: tuple[Worker, Worker]
) -> None:
    first, second = workers
    second.metrics.packed(100)
    second.running = 1
    second.reports.publish()
    (report,) = first.reports.others()
    assert report.builds == BUILDS
    long_ago = time.time() - 1000
    os.utime(tmp_path / "2.report", (long_ago, long_ago))
    (report,) = first.reports.others()
    assert report.builds == BUILDS[1:]
    told = first.samples()
    assert (told["chandlery_packed_bytes_total[]"], told["chandlery_running_builds[]"]) == (100, 0)


def test_a_report_that_cannot_be_read_is_passed_over(tmp_path: Path, workers: tuple[Worker, Worker]) -> None:
    (tmp_path / "3.report").write_bytes(b'{"figures": {')
    assert list(workers[0].reports.others()) == []


def test_a_worker_that_cannot_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Worker(tmp_path / "missing", 1, monkeypatch).reports.publish()
