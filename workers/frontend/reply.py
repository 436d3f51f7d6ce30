"""What a route needs of the connection that it answers on. A batch's requests are answered on one that only keeps the answer."""

from __future__ import annotations

from typing import Protocol

from workers.frontend.http import Request
from workers.frontend.trace import context_of

REQUEST_ID_HEADER = "x-request-id"


class Reply(Protocol):
    """The answer to one request; `http.Connection` is one."""

    status: int
    """Of the answer; 0 before it has begun."""

    def respond(
        self, status: int, body: bytes, headers: bytes = b"", content_type: bytes = b"application/json"
    ) -> None:
        """Answer whole."""
        ...

    def begin_events(self, headers: bytes = b"") -> None:
        """Begin a stream of server-sent events."""
        ...

    def write(self, data: bytes) -> None:
        """Send bytes of a stream, framed as the request's `chunked` says."""
        ...

    def flush(self) -> None:
        """Send what was written at once, and not together with what comes soon."""
        ...

    def end_events(self) -> None:
        """End the stream."""
        ...


class Kept:
    """A reply that nobody hears: it keeps a whole answer. Streams are not for it."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    def respond(
        self, status: int, body: bytes, headers: bytes = b"", content_type: bytes = b"application/json"
    ) -> None:
        """Reply."""
        self.status, self.body = status, body

    def begin_events(self, headers: bytes = b"") -> None:
        """Reply."""
        raise NotImplementedError("a kept answer is no stream")

    def write(self, data: bytes) -> None:
        """Reply."""
        raise NotImplementedError("a kept answer is no stream")

    def flush(self) -> None:
        """Reply."""

    def end_events(self) -> None:
        """Reply."""
        raise NotImplementedError("a kept answer is no stream")


def told(request: Request) -> bytes:
    """Header lines of every answer: the request's id, and the trace that it belongs to."""
    lines = b"x-request-id: %b\r\n" % request.headers[REQUEST_ID_HEADER].encode("latin-1", "replace")
    trace = context_of(request.headers)
    return lines if trace is None else lines + b"traceparent: %b\r\n" % trace["traceparent"].encode("latin-1")
