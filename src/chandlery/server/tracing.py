"""OpenTelemetry traces: a span for every request, every build, and every step of a build.

This module is imported only if traces are asked for, and nothing else imports OpenTelemetry: without them it
needn't be installed. A build's spans are made of its timeline when it ends, as children of the request that
asked for it first; so what builds knows nothing of traces.
"""

from typing import Self

from opentelemetry import trace
from opentelemetry.context import Context, get_current
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chandlery import __version__
from chandlery.builds.build import Build, BuildState
from chandlery.server.request_log import route_of

_NANOSECONDS = 1_000_000_000


class Traces:
    """Makes spans, and hands them to what `provider` has for that."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("chandlery", __version__)

    @classmethod
    def to_collector(cls) -> Self:
        """Send spans by OTLP over HTTP; where to, and all else, is in the standard OTEL_ variables."""
        own = Resource.create({"service.name": "chandlery", "service.version": __version__})
        provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    @property
    def middleware(self) -> Middleware:
        """What makes the spans of requests; it stands inside of `RequestLog`."""
        return Middleware(RequestTraces, traces=self)

    def close(self) -> None:
        """Hand over the spans that are left; this waits for the collector."""
        self._provider.shutdown()

    def request(self, scope: Scope) -> Span:
        """Begin the span of a request, in the trace that the client's `traceparent` names if there is one."""
        caller = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        return self._tracer.start_span(scope["method"], caller, kind=SpanKind.SERVER, attributes=attributes)

    def built(self, build: Build) -> None:
        """Make the spans of a build that has ended."""
        asked_at = int(build.asked_at * _NANOSECONDS)
        span = self._tracer.start_span(
            "build",
            # A copy: the build itself may be what runs now, in its context.
            build.context.copy().run(get_current),
            attributes={"chandlery.build": build.id, "chandlery.image": build.image},
            start_time=asked_at,
        )
        inside = trace.set_span_in_context(span, Context())
        for step, begin, end in build.steps:
            part = self._tracer.start_span(step, inside, start_time=asked_at + int(begin * _NANOSECONDS))
            part.end(asked_at + int(end * _NANOSECONDS))
        if build.state is not BuildState.FINISHED:
            span.set_status(Status(StatusCode.ERROR, str(build.error or build.state)))
        span.end(asked_at + int(build.seconds * _NANOSECONDS))


class RequestTraces:
    """A plain ASGI middleware that makes a span of every request, and the current one while it lasts."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        span = self._traces.request(scope)

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
            await send(message)

        with trace.use_span(span, end_on_exit=True):
            try:
                await self._app(scope, receive, send_noted)
            finally:
                route = route_of(scope)
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
                span.set_attribute("chandlery.request_id", scope["state"]["request_id"])
