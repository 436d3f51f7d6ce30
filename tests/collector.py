"""A collector of OpenTelemetry traces over HTTP, which keeps the spans that it is sent."""

from __future__ import annotations

import contextlib
import gzip
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """The spans so far, and where they are sent to."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Any] = []

    def span(self, name: str) -> Any:
        """The span of that id, in hexadecimal digits, once it is there."""
        return self.wait_for(lambda span: span.span_id.hex() == name)

    def wait_for(self, wanted: Callable[[Any], bool], timeout_s: float = 20) -> Any:
        """The first span that is wanted, once it is there."""
        deadline = time.monotonic() + timeout_s
        while True:
            for span in list(self.spans):
                if wanted(span):
                    return span
            assert time.monotonic() < deadline, [span.name for span in self.spans]
            time.sleep(0.05)


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """Run one on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            sent = ExportTraceServiceRequest.FromString(body)
            running.spans += [
                span for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans
            ]
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
