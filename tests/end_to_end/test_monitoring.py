"""Watching a real server: while it builds, when something that it needs is gone, and by traces."""

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.package_sets import PACKAGE_SET, Gates
from tests.support.running import require
from tests.support.servers import LIMIT, RunningServer, serving, wait_until


@pytest.fixture
def package_set(tmp_path: Path) -> Path:
    """Return a package set of the test's own, which it may take away."""
    require("nix", root=False)
    return Path(shutil.copytree(PACKAGE_SET, tmp_path / "set"))


def builds(server: RunningServer) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = server.get("/builds").json()
    return listed


def figures(server: RunningServer) -> dict[str, float]:
    """Return every sample by its name and the values of its labels."""
    return {
        " ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
    }


def test_a_build_can_be_watched_from_its_beginning_to_its_end(tmp_path: Path, package_set: Path) -> None:
    gates = Gates(tmp_path / "gates", tmp_path / "data")
    path = "/v2/waiting-a/manifests/latest"
    with (
        serving(tmp_path / "data", f"path!{package_set}", tmp_path / "log") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        pull = pool.submit(server.get, path)
        wait_until(lambda: gates.is_reached("waiting-a"))
        (build,) = builds(server)
        assert (build["state"], build["position"], build["waiters"]) == ("running", 0, 1)
        assert [each["step"] for each in build["timeline"]] == ["resolve", "realise"]
        assert figures(server)["chandlery_running_builds"] == 1
        with httpx.stream("GET", f"{server.url}{build['log']}", timeout=LIMIT) as log:
            parts = log.iter_text()
            said = next(parts)
            assert "waiting-a-1.0.drv" in said
            gates.open("waiting-a")
            said += "".join(parts)
        assert pull.result().is_success
        assert said == server.get(build["log"]).text
        (build,) = builds(server)
        assert build["state"] == "finished"
        assert [each["step"] for each in build["timeline"]] == ["resolve", "realise", "pack", "finished"]
        # Not the same request again: what is answered from memory looks for nothing.
        assert httpx.head(f"{server.url}{path}").is_success
        counted = figures(server)
    assert counted["chandlery_build_duration_seconds_count finished"] == 1
    assert counted["chandlery_cache_lookups_total image hit"] == 1
    assert counted["chandlery_cache_lookups_total image miss"] == 1
    assert counted["chandlery_cache_lookups_total layer miss"] > 0
    assert counted["chandlery_cache_lookups_total resolution miss"] > 0
    assert counted["chandlery_packed_bytes_total"] > 0
    assert counted["chandlery_requests_total GET manifest 200"] == 1
    assert counted["chandlery_requests_total HEAD manifest 200"] == 1


def test_a_server_whose_disk_is_gone_is_alive_and_not_ready_and_a_source_may_be_away(
    tmp_path: Path, package_set: Path
) -> None:
    data = tmp_path / "data"
    with serving(data, f"path!{package_set}", tmp_path / "log") as server:
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]) == (
            200,
            {"storage": "ok", "nix": "ok", "source": "ok"},
        )
        shutil.rmtree(package_set)
        shutil.rmtree(data / "tmp")
        # What was found a moment ago is told for some seconds.
        wait_until(lambda: server.get("/readyz").status_code == 503)
        checks = server.get("/readyz").json()["checks"]
        # Its last good pin serves.
        assert checks["source"] == "ok"
        assert str(data) in checks["storage"]
        assert checks["nix"] == "ok"
        assert server.get("/healthz").is_success


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Any] = []


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        content = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name in the base class)
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield listener
        listener.shutdown()
        thread.join()


def test_spans_reach_a_collector_even_the_last_ones(
    tmp_path: Path, package_set: Path, collector: Collector
) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        # Nothing is sent before the server stops.
        "OTEL_BSP_SCHEDULE_DELAY": "600000",
    }
    source = f"path!{package_set}"
    with serving(tmp_path / "data", source, tmp_path / "log", variables=variables) as server:
        assert server.get("/v2/hello/manifests/latest").is_success
        server.process.terminate()
        server.process.wait(LIMIT)
    spans = {span.name: span for span in collector.spans}
    assert {"GET manifest", "build", "queued", "resolve", "realise", "pack"} <= set(spans)
    assert spans["build"].parent_span_id == spans["GET manifest"].span_id
