import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chandlery.builds.build import Build
from chandlery.builds.build_queue import QueueLimits
from chandlery.errors import BuildError
from chandlery.oci.documents import BuiltImage
from chandlery.server.request_log import RequestLog
from chandlery.server.tracing import Traces
from tests.support.queues import IMAGE, WorkQueue, name_of
from tests.support.servers import environment


@dataclass
class Recorded:
    """Traces, and the spans that were made."""

    traces: Traces
    exporter: InMemorySpanExporter
    folder: Path

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[Recorded]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = Traces(provider)
    yield Recorded(traces, exporter, tmp_path)
    traces.close()


async def work(build: Build) -> BuiltImage:
    for step in ("resolve", "realise", "pack"):
        build.step(step)
        await asyncio.sleep(0)
    if name_of(build) == "broken":
        raise BuildError("broken", "it is broken", [])
    return IMAGE


async def pull(recorded: Recorded, image: str, **headers: str) -> httpx.Response:
    """Send a request to an application that builds an image."""
    async with WorkQueue(QueueLimits(), recorded.folder) as queue:
        queue.observers.append(recorded.traces.built)

        async def endpoint(request: Request) -> Response:
            await queue.ask(image, work, "client")
            return Response(status_code=203)

        app = Starlette(
            routes=[Route("/v2/{name}", endpoint, name="manifest")],
            middleware=[Middleware(RequestLog), recorded.traces.middleware],
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
            return await client.get("/v2/git", headers=headers)


async def test_a_request_a_build_and_its_steps_are_spans_of_one_trace(recorded: Recorded) -> None:
    response = await pull(recorded, "git")
    spans = recorded.spans()
    assert set(spans) == {"GET manifest", "build", "queued", "resolve", "realise", "pack"}
    request, build = spans["GET manifest"], spans["build"]
    assert request.attributes == {
        "http.request.method": "GET",
        "http.response.status_code": 203,
        "http.route": "manifest",
        "url.path": "/v2/git",
        "chandlery.request_id": response.headers["x-request-id"],
    }
    assert build.parent == request.context
    assert all(spans[step].parent == build.context for step in ("queued", "resolve", "realise", "pack"))
    assert build.attributes is not None
    assert build.attributes["chandlery.image"] == "git for linux/amd64"


async def test_steps_follow_each_other_within_their_build(recorded: Recorded) -> None:
    await pull(recorded, "git")
    spans = recorded.spans()
    steps = [spans[name] for name in ("queued", "resolve", "realise", "pack")]
    begins = [span.start_time or 0 for span in steps]
    ends = [span.end_time or 0 for span in steps]
    assert ends[:-1] == begins[1:]
    assert (begins[0], ends[-1]) == (spans["build"].start_time, spans["build"].end_time)


async def test_a_build_that_failed_is_an_error(recorded: Recorded) -> None:
    await pull(recorded, "broken")
    status = recorded.spans()["build"].status
    assert status.status_code is StatusCode.ERROR
    assert "it is broken" in str(status.description)


async def test_the_trace_of_the_client_goes_on(recorded: Recorded) -> None:
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    await pull(recorded, "git", traceparent=f"00-{trace_id}-{span_id}-01")
    request = recorded.spans()["GET manifest"]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == span_id
    assert {f"{span.context.trace_id:032x}" for span in recorded.spans().values() if span.context} == {
        trace_id
    }


@pytest.mark.parametrize(
    "value", ["", "00-zz-zz-01", "\x7f" * 100, "00-" + "0" * 32 + "-" + "0" * 16 + "-00"]
)
async def test_a_trace_that_makes_no_sense_harms_nobody(recorded: Recorded, value: str) -> None:
    assert (await pull(recorded, "git", traceparent=value)).status_code == 203


APP = """
import sys
from chandlery.server.app import create_app
from chandlery.settings.settings import Settings
{before}
app = create_app(Settings.load())
imported = {{name.partition(".")[0] for name in sys.modules}} & {{"opentelemetry"}}
print(sorted(imported), len(app.user_middleware))
"""


def application(tmp_path: Path, before: str = "", **variables: str) -> str:
    """Make an application in a process of its own; give what it logged and what it imported."""
    finished = subprocess.run(
        [sys.executable, "-c", APP.format(before=before)],
        env=environment(CHANDLERY_DATA_DIR=str(tmp_path), **variables),
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout


def test_without_a_collector_nothing_of_opentelemetry_is_imported(tmp_path: Path) -> None:
    assert application(tmp_path) == "[] 2\n"


def test_the_standard_variable_turns_traces_on(tmp_path: Path) -> None:
    written = application(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert written == "['opentelemetry'] 3\n"


def test_the_setting_turns_them_off_again(tmp_path: Path) -> None:
    written = application(
        tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", CHANDLERY_TRACES="false"
    )
    assert written == "[] 2\n"


def test_traces_that_are_asked_for_but_not_installed_are_a_warning(tmp_path: Path) -> None:
    missing = "sys.modules['opentelemetry'] = None"
    written = application(tmp_path, before=missing, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert "pip install 'chandlery[otel]'" in written
    assert written.endswith(" 2\n")
