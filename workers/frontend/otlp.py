"""Spans of requests by OpenTelemetry, sent to a collector over OTLP/HTTP. Imported only where a recipe names a collector."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from workers.frontend.http import Request
from workers.frontend.trace import Span, Tracer

DELAY_MS, CLOSE_MS = 1000, 2000


class OtlpTracer(Tracer):
    """Makes a span of each request, as a child of the client's where its headers name one, and as the parent of the legs.

    Args:
        endpoint: URL that traces are posted to, /v1/traces and all.
        service: Name of the deployment.
        member: Name of this process.
    """

    def __init__(self, endpoint: str, service: str, member: str) -> None:
        resource = Resource.create({"service.name": service, "service.instance.id": member})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint), schedule_delay_millis=DELAY_MS)
        )
        self._tracer = self._provider.get_tracer("baton.frontend")
        self._context = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def span(self, request: Request) -> Iterator[Span]:
        """See `Tracer`. The span's own context takes the place of the client's in the headers."""
        parent = self._context.extract(request.headers)
        shown = Span()
        span = self._tracer.start_span(request.method, context=parent, kind=trace.SpanKind.SERVER)
        self._context.inject(request.headers, context=trace.set_span_in_context(span))
        try:
            yield shown
        finally:
            span.update_name(f"{request.method} {shown.name}".strip())
            span.set_attribute("http.request.method", request.method)
            span.set_attribute("http.response.status_code", shown.status)
            span.set_attribute("http.request.header.x-request-id", request.headers.get("x-request-id", ""))
            if shown.name:
                span.set_attribute("http.route", shown.name)
            if shown.status >= 500:
                span.set_status(trace.StatusCode.ERROR)
            span.end()

    def close(self) -> None:
        """See `Tracer`."""
        self._provider.force_flush(CLOSE_MS)
        self._provider.shutdown()
