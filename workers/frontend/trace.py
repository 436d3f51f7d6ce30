"""W3C trace context: taken from a request's headers, and passed on with every leg to the engines.

Source: https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from workers.frontend.http import Request

TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
MAX_STATE = 512


def context_of(headers: Mapping[str, str]) -> dict[str, str] | None:
    """The trace context of a request, under the names of its headers; None when it has none.

    One that is malformed is none, as the source has it: a request is not refused for it.
    """
    parent = headers.get("traceparent", "")
    if not TRACEPARENT.fullmatch(parent):
        return None
    state = headers.get("tracestate", "")
    return {"traceparent": parent} | ({"tracestate": state} if 0 < len(state) <= MAX_STATE else {})


class Span:
    """A request, as its trace shows it; whoever answers it sets name and status. This one is shown nowhere."""

    name = ""
    status = 0


class Tracer:
    """Makes a span of each request. This one makes none: it passes on the context that came (see `otlp.OtlpTracer`)."""

    @contextlib.contextmanager
    def span(self, request: Request) -> Iterator[Span]:
        """The span of a request; its headers have the context that legs belong to."""
        yield Span()

    def close(self) -> None:
        """Send what was not sent yet; blocks."""
