"""HTTP/1.1 on asyncio, as little of it as an API server needs: httptools parses, this module keeps the connection.

A connection serves one request at a time; pipelined ones wait. The handler runs as a task that is cancelled when the
client goes away. Streaming answers are written straight to the transport: per token nothing is awaited and no task wakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import unquote

import httptools

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
MAX_PIPELINED = 16
SWEEP_S = 5.0
CHUNKED_END = b"0\r\n\r\n"
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


@dataclass(slots=True)
class Request:
    """A whole request; header names are lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    chunked: bool
    """Whether the client's HTTP version knows chunked answers."""
    keep_alive: bool
    query: str = ""
    """What follows the question mark, as it was sent."""
    key_id: str = ""
    """Whose key it came with, once that was checked (`workers.frontend.keys`)."""


Handler = Callable[[Request, "Connection"], Awaitable[None]]
# (status, message) to the (headers, body) of an error that the HTTP layer itself answers with.
ErrorBody = Callable[[int, str], bytes]


@dataclass(slots=True)
class Server:
    """What all connections of a listening socket share."""

    handler: Handler
    error_body: ErrorBody
    max_body_bytes: int
    request_timeout_s: float = 120.0
    """A request has to be there within, head and body; else it is answered with 408."""
    idle_timeout_s: float = 600.0
    """A connection between two requests is kept for."""
    connections: set[Connection] = field(default_factory=set)
    one_closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def sweep(self) -> None:
        """Close, for ever, connections that owe the rest of a request for too long, and those that nobody uses.

        Whoever opens connections and says little would else hold a descriptor, and what he has sent, without end.
        """
        while True:
            await asyncio.sleep(SWEEP_S)
            for connection in list(self.connections):
                connection.hurry(self.request_timeout_s, self.idle_timeout_s)

    async def wait_closed(self, timeout_s: float) -> None:
        """Give slow readers that long to take the last bytes of connections that are closing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.connections:
                    await self.one_closed.wait()

    def protocol(self) -> Connection:
        """A protocol for a new connection."""
        return Connection(self)


class Connection(asyncio.Protocol):
    """One client connection, and the answer to its current request."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._current: Request | None = None
        self.status = 0
        """Status of the current answer; 0 before it has begun."""
        self._paused_reading = False
        self._waits_since = time.monotonic()
        self._receiving = False
        self._reset()

    # --- asyncio's side -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]  # a stream protocol gets a Transport
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol; nobody reads the answer any more."""
        self._transport = None
        self._server.connections.discard(self)
        self._server.one_closed.set()
        self._server.one_closed.clear()  # whoever waits is already woken; the next wait is for the next one
        if self._task:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol."""
        if self._refused:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request itself is complete and is answered as HTTP/1.1, which RFC 9110 §7.8 allows; what follows it, in
            # whatever protocol, is not read.
            self._parser = httptools.HttpRequestParser(self)
        except httptools.HttpParserError as error:
            self._refuse(400, f"this is not HTTP/1.1: {error}")

    # --- httptools' side ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """httptools callback."""
        self._reset()
        self._receiving = True
        self._waits_since = time.monotonic()

    def on_url(self, url: bytes) -> None:
        """httptools callback; long URLs come in parts."""
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools callback."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        self._count_head(len(name) + len(value) + 4)  # with the colon, the space and the line end

    def on_headers_complete(self) -> None:
        """httptools callback."""
        length = self._headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._server.max_body_bytes:
            self._too_large()
        elif self._headers.get("expect", "").lower() == "100-continue" and self._task is None:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """httptools callback."""
        self._size += len(body)
        if self._size > self._server.max_body_bytes:
            self._too_large()
        elif not self._refused:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """httptools callback."""
        self._receiving = False
        if self._refused:
            return
        path, _, query = self._url.decode("latin-1").partition("?")
        request = Request(
            method=self._parser.get_method().decode(),
            path=unquote(path),
            query=query,
            headers=self._headers,
            body=b"".join(self._body),
            chunked=self._parser.get_http_version() == "1.1",
            keep_alive=self._parser.should_keep_alive(),
        )
        self._waiting.append(request)
        if len(self._waiting) >= MAX_PIPELINED and self._transport:
            self._transport.pause_reading()
            self._paused_reading = True
        self._next()

    # --- the handler's side -------------------------------------------------------------------------------------

    def respond(
        self, status: int, body: bytes, headers: bytes = b"", content_type: bytes = b"application/json"
    ) -> None:
        """Answer the current request whole; `headers` are further header lines, each ending in CRLF."""
        self.status = status
        close = b"" if self._current and self._current.keep_alive else b"Connection: close\r\n"
        self.write(
            b"%bContent-Type: %b\r\nContent-Length: %d\r\n%b%b\r\n%b"
            % (STATUS_LINES[status], content_type, len(body), close, headers, b"" if self._is_head else body)
        )

    def begin_events(self, headers: bytes = b"") -> None:
        """Begin a stream of server-sent events; what follows must be chunked as the request's `chunked` says."""
        assert self._current
        self.status = 200
        framing = b"Transfer-Encoding: chunked\r\n" if self._current.chunked else b"Connection: close\r\n"
        self.write(
            b"%bContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n%b%b\r\n"
            % (STATUS_LINES[200], framing, headers)
        )

    def write(self, data: bytes) -> None:
        """Send; what a slow client does not take yet waits in the transport."""
        if self._transport:
            self._transport.write(data)

    def end_events(self) -> None:
        """End a stream of server-sent events."""
        assert self._current
        if self._current.chunked:
            self.write(CHUNKED_END)
        else:
            self._current.keep_alive = False

    def close(self) -> None:
        """Close once what was written has been sent."""
        if self._transport:
            self._transport.close()

    def hurry(self, request_timeout_s: float, idle_timeout_s: float) -> None:
        """Close a connection on which no request is answered if it has been waiting for the client for too long."""
        if self._task is not None or self._refused:
            return
        waited_s = time.monotonic() - self._waits_since
        if self._receiving and waited_s > request_timeout_s:
            self._refuse(408, f"the request was not complete within {request_timeout_s:.0f} s")
        elif not self._receiving and waited_s > idle_timeout_s:
            self.close()

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The task that answers the current request, if there is one."""
        return self._task

    @property
    def _is_head(self) -> bool:
        return self._current is not None and self._current.method == "HEAD"

    # --- inside -------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._head_size = 0
        self._body: list[bytes] = []
        self._size = 0
        self._refused = False

    def _next(self) -> None:
        if self._task is None and self._waiting:
            self._current = self._waiting.popleft()
            self._task = asyncio.create_task(self._serve(self._current))
            if self._paused_reading and self._transport:
                self._transport.resume_reading()
                self._paused_reading = False

    async def _serve(self, request: Request) -> None:
        self.status = 0
        try:
            await self._server.handler(request, self)
        except Exception:  # the last line of defence: a bug ends this connection, not the frontend
            log.exception("%s %s failed", request.method, request.path)
            request.keep_alive = False
            if not self.status:
                self.respond(500, self._server.error_body(500, "internal error"))
        finally:
            self._task = None
            self._waits_since = time.monotonic()
        if self._refused:
            request.keep_alive = False
        if not request.keep_alive:
            self.close()
            return
        self._next()

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > MAX_HEAD_BYTES:
            self._refuse(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes")

    def _too_large(self) -> None:
        self._refuse(413, f"the request's body is larger than {self._server.max_body_bytes} bytes")

    def _refuse(self, status: int, message: str) -> None:
        """Answer what cannot be read as a request, and close: where the next request begins is not known."""
        if self._refused:
            return
        self._refused = True
        self._body.clear()
        if self._task is not None:
            return  # the running answer is finished first; the connection closes after it
        self._current = None
        self.respond(status, self._server.error_body(status, message))
        self.close()
