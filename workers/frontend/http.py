"""HTTP/1.1 on asyncio, as little of it as an API server needs: httptools parses, this module keeps the connection.

A connection serves one request at a time; pipelined ones wait. The handler runs as a task that is cancelled when the
client goes away. Per token of a stream nothing is awaited and no task wakes: its bytes join those that wait for their
connection, and an `Outbox` sends what waits for all. What a client does not take, or does not send, is bounded in size and
time (`workers.frontend.limits`): past it the connection is cut, which cancels its request.
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

from workers.frontend.limits import ConnectionLimits

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
MAX_PIPELINED = 16
HIGH_WATER_BYTES = 64 << 10
CHECK_S = 0.5
TURN_AWAY = 1000  # connections over the limit that are told so; more are closed unheard
# A write to a socket costs about 5 us, most of it in the kernel, however little it carries. Writes get a ninth of the time.
WRITE_S = 5e-6
REST_FOR_WRITES = 8
MAX_HOLD_S = 0.01
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


class Outbox:
    """Sends what waits for connections: at once while there is time, and together when there is not.

    After a round of writes the next is held back for eight times what the round has cost, 10 ms at most. A server with time to
    spare never notices. In a busy one what several engine steps bring for a client leaves in one write, so that tokens get
    cheaper the more of them there are.
    """

    def __init__(self) -> None:
        self._waiting: list[Connection] = []
        self._next = 0.0

    def add(self, connection: Connection) -> None:
        """The connection has something to send, and had not before."""
        if not self._waiting:
            loop = asyncio.get_running_loop()
            if loop.time() >= self._next:
                loop.call_soon(self._round)
            else:
                loop.call_at(self._next, self._round)
        self._waiting.append(connection)

    def _round(self) -> None:
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            connection.flush()
        hold_s = min(MAX_HOLD_S, len(waiting) * WRITE_S * REST_FOR_WRITES)
        self._next = asyncio.get_running_loop().time() + hold_s


@dataclass(slots=True)
class Server:
    """What all connections of a listening socket share. `on_cut` is told why connections were cut, in a word."""

    handler: Handler
    error_body: ErrorBody
    max_body_bytes: int
    limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    on_cut: Callable[[str], None] = lambda why: None
    connections: set[Connection] = field(default_factory=set)
    one_closed: asyncio.Event = field(default_factory=asyncio.Event)
    outbox: Outbox = field(default_factory=Outbox)

    async def wait_closed(self, timeout_s: float) -> None:
        """Give slow readers that long to take the last bytes of connections that are closing."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.connections:
                    await self.one_closed.wait()

    async def keep(self) -> None:
        """Cut the connections that are past their limits; for ever."""
        while True:
            await asyncio.sleep(CHECK_S)
            now = time.monotonic()
            for connection in list(self.connections):
                connection.check(now)

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
        self._turned_away = False
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._streaming = False
        """What is written comes bit by bit and may be more than a client takes; a whole answer is in memory already."""
        self._full = False
        """The transport holds as much as it should: what more there is stays here."""
        self._sent_bytes = 0
        self._taken_bytes = 0
        self._taken_at = self._idle_at = self._reading_at = time.monotonic()
        self._reading = False
        self._reset()

    # --- asyncio's side -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]  # a stream protocol gets a Transport
        assert self._transport
        self._transport.set_write_buffer_limits(HIGH_WATER_BYTES)
        self._server.connections.add(self)
        over = len(self._server.connections) - self._server.limits.connections
        self._turned_away = over > 0
        if over > TURN_AWAY:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol; nobody reads the answer any more."""
        self._transport = None
        # The parser and the connection hold each other. Left so, every connection there was would stay, with the body of its
        # last request, until Python looks for cycles: that is once in hundreds of connections, whatever their bodies weigh.
        del self._parser
        self._waiting.clear()
        self._out.clear()
        self._server.connections.discard(self)
        self._server.one_closed.set()
        self._server.one_closed.clear()  # whoever waits is already woken; the next wait is for the next one
        if self._task:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol."""
        if self._refused:
            return
        if self._turned_away:
            self._refuse(503, "there are too many connections", b"Retry-After: 5\r\n")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request itself is complete and is answered as HTTP/1.1, which RFC 9110 §7.8 allows; what follows it, in
            # whatever protocol, is not read.
            self._parser = httptools.HttpRequestParser(self)
        except httptools.HttpParserError as error:
            self._refuse(400, f"this is not HTTP/1.1: {error}")

    def pause_writing(self) -> None:
        """asyncio.Protocol: the client does not take what there is."""
        self._full = True

    def resume_writing(self) -> None:
        """asyncio.Protocol."""
        self._full = False
        self.flush()

    # --- httptools' side ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """httptools callback."""
        self._reset()
        self._reading, self._reading_at = True, time.monotonic()

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
            self.flush()

    def on_body(self, body: bytes) -> None:
        """httptools callback."""
        self._size += len(body)
        if self._size > self._server.max_body_bytes:
            self._too_large()
        elif not self._refused:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """httptools callback."""
        self._reading = False
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
        self.flush()

    def begin_events(self, headers: bytes = b"") -> None:
        """Begin a stream of server-sent events; what follows must be chunked as the request's `chunked` says.

        The head leaves with the first event.
        """
        assert self._current
        self.status = 200
        self._streaming = True
        framing = b"Transfer-Encoding: chunked\r\n" if self._current.chunked else b"Connection: close\r\n"
        self.write(
            b"%bContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n%b%b\r\n"
            % (STATUS_LINES[200], framing, headers)
        )

    def write(self, data: bytes) -> None:
        """Send soon; called for every event of a stream."""
        if self._transport is None:
            return
        if not self._out:
            self._server.outbox.add(self)
        self._out.append(data)
        self._out_bytes += len(data)
        if self._full and self._out_bytes > self._server.limits.unsent_bytes and self._streaming:
            self._cut("slow_reader", f"{self._out_bytes} bytes wait for a client that reads too slowly")

    def flush(self) -> None:
        """Send what waits, unless the transport holds too much already: then it waits on for `resume_writing`."""
        if self._transport is not None and self._out and not self._full:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            self._out_bytes = 0
            self._sent_bytes += len(data)
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
        if self._transport is None:
            return
        self._full = False
        self.flush()
        self._transport.close()

    def check(self, now: float) -> None:
        """Cut the connection if its client is past a limit; `now` is of the monotonic clock."""
        if self._transport is None:
            return
        limits = self._server.limits
        taken = self._sent_bytes - self._transport.get_write_buffer_size()
        if taken == self._sent_bytes or taken > self._taken_bytes:
            self._taken_bytes, self._taken_at = taken, now
        elif now - self._taken_at > limits.reader_s:
            self._cut("stalled_reader", f"its client took nothing for {limits.reader_s:g} s")
            return
        if self._task is not None:
            return
        if self._reading and not self._refused:
            if now - self._reading_at > limits.arrives_by(self._size):
                self._server.on_cut("slow_request")
                self._refuse(408, f"the request did not arrive within {limits.arrives_by(self._size):.0f} s")
        elif taken == self._sent_bytes and now - self._idle_at > limits.keep_alive_s:
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
        self._streaming = False
        try:
            await self._server.handler(request, self)
        except Exception:  # the last line of defence: a bug ends this connection, not the frontend
            log.exception("%s %s failed", request.method, request.path)
            request.keep_alive = False
            if not self.status:
                self.respond(500, self._server.error_body(500, "internal error"))
        finally:
            self._task = None
            self._idle_at = time.monotonic()
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

    def _cut(self, why: str, message: str) -> None:
        """Drop the connection and what waits for it; losing it cancels its request."""
        log.warning("cut a connection: %s", message)
        self._server.on_cut(why)
        self._out.clear()
        self._out_bytes = 0
        if self._transport:
            self._transport.abort()

    def _refuse(self, status: int, message: str, headers: bytes = b"") -> None:
        """Answer what cannot be read as a request, and close: where the next request begins is not known."""
        if self._refused:
            return
        self._refused = True
        self._body.clear()
        if self._task is not None:
            return  # the running answer is finished first; the connection closes after it
        self._current = None
        self.respond(status, self._server.error_body(status, message), headers)
        self.close()
