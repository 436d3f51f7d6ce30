"""What is fuzzed: each target takes any bytes, and raises where a promise is broken.

frames  the decoder of the request plane: a message or a DecodeError, and a message is the same after another turn
http    a connection: whatever comes, in whatever packets, it answers in HTTP or not at all, and nothing of it stays
bodies  what reads the bodies of requests: it can be served, or is an ApiError of the client's; packed ones too
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable
from typing import Any

import msgspec

from workers.frontend.bodies import gunzip
from workers.frontend.errors import ApiError, error_body
from workers.frontend.http import Connection, Request, Server
from workers.frontend.limits import ConnectionLimits
from workers.frontend.messages import MessageRequest
from workers.frontend.openai import ChatRequest, CompletionRequest, options, parse
from workers.frontend.responses import ResponseRequest, as_messages
from workers.runtime import wire

BODY_LIMIT = 1000
TURNS = 10_000


def frames(data: bytes) -> None:
    """Noise is no message of the request plane."""
    for decode in (wire.decode_to_worker, wire.decode_to_frontend):
        try:
            message = decode(data)
        except msgspec.DecodeError:
            continue
        again = wire.encode(message)
        if wire.encode(decode(again)) != again:  # compared as bytes: a NaN does not equal itself
            raise AssertionError(f"{data!r} is another message after another turn")


def http(data: bytes) -> None:
    """The first byte says into how many packets the rest is cut."""
    asyncio.run(_connection(data[1:], 1 + data[0] % 16 if data else 1))


def bodies(data: bytes) -> None:
    """The first byte says what they are read as."""
    kind, body = (data[0] if data else 0) % 5, data[1:]
    try:
        if kind == 0:
            chat, fields = parse(body, ChatRequest)
            chat.check(fields)
            options(fields, chat=True)
            msgspec.json.encode(chat.template_variables)
        elif kind == 1:
            completion, fields = parse(body, CompletionRequest)
            completion.check(fields)
            completion.prompts()
            options(fields, chat=False)
        elif kind == 2:
            count, _ = parse(body, MessageRequest)
            count.check()
        elif kind == 3:
            response, _ = parse(body, ResponseRequest)
            as_messages(response.input, [])
        elif len(gunzip(body, BODY_LIMIT)) > BODY_LIMIT:
            raise AssertionError(f"{body!r} is unpacked to more than {BODY_LIMIT} bytes")
    except ApiError as error:
        if not 400 <= error.status < 500:
            raise AssertionError(f"{body!r} is the client's mistake and not {error.status}") from error


TARGETS: dict[str, Callable[[bytes], None]] = {"frames": frames, "http": http, "bodies": bodies}

POST = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"
GENERATE = wire.Generate(
    1, wire.Leg.DECODE, "r", b"\1\0\0\0", b"", b"{}", 5, wire.NOTHING, b"t", 1.5, trace={"traceparent": "0"}
)
STEP = wire.Step(
    [wire.Delta(1, b"\1\0\0\0", b"x")],
    [wire.End(2, "stop", b"", b"", 1, 2, 0)],
    [wire.Prefilled(3, b"t", 1.5, 4, 0)],
    [wire.Failed(4, 503, "m", True)],
    [wire.Called(5, 200, b"{}", "application/json", 6)],
)
SEEDS: dict[str, tuple[bytes, ...]] = {
    "frames": tuple(
        map(
            wire.encode,
            (
                *(GENERATE, wire.Call(1, "r", "score", b"{}"), wire.Cancel(1), wire.Release("r", b"t"), wire.Ping()),
                *(STEP, wire.Beat("i", 1, True, 2)),
            ),
        )
    ),
    "http": (
        b"\0" + POST + b"Content-Length: 5\r\n\r\nhello",
        b"\5" + (POST + b"Content-Length: 2\r\n\r\nhi") * 3,
        b"\3" + POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"\2" + POST + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\n1",
        b"\1" + POST + b"Upgrade: h2c\r\nConnection: Upgrade, close\r\n\r\n",
        b"\7" + POST + b"Content-Length: 1001\r\n\r\n",
        b"\0HEAD /%ff?x=%00 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    ),
    "bodies": (
        b'\0{"model":"m","messages":[{"role":"user","content":"c"}],"tools":[{}],"max_completion_tokens":5,"n":2}',
        b'\1{"model":"m","prompt":[[1,2],[3]],"stream":true,"stream_options":{"include_usage":true},"echo":true}',
        b'\1{"model":"m","prompt":"p","tools":[{}],"messages":1}',
        b'\2{"model":"m","max_tokens":9,"messages":[{"role":"user","content":[{"type":"text","text":"t"}]}]}',
        b'\3{"model":"m","input":[{"type":"function_call","name":"f","arguments":"{}","call_id":"c"},{"role":"user"}]}',
        b"\4" + gzip.compress(b"x" * 500),
        b"\4" + gzip.compress(b"x" * 100 * BODY_LIMIT),
    ),
}
"""Inputs to begin with: noise from nothing hardly ever gets past the first line."""


class Wire(asyncio.Transport):
    """A client's end: keeps what it is sent; a connection that is closed is lost in the next turn of the loop."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False
        self._connection = connection

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Keep it."""
        if self.closed:
            raise AssertionError("something was written to a closed connection")
        self.sent += data

    def close(self) -> None:
        """Lose the connection, once."""
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)

    abort = close

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Everything is taken at once."""

    def get_write_buffer_size(self) -> int:
        """Everything was taken."""
        return 0

    def pause_reading(self) -> None:
        """What is on its way comes all the same, as with a real transport."""

    def resume_reading(self) -> None:
        """It never ceased."""


async def _connection(data: bytes, parts: int) -> None:
    async def handle(request: Request, connection: Connection) -> None:
        await asyncio.sleep(0)
        connection.respond(200, request.body)

    failed: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failed.append(context))
    server = Server(handle, error_body, BODY_LIMIT, ConnectionLimits())
    connection = server.protocol()
    transport = Wire(connection)
    connection.connection_made(transport)
    size = len(data) // parts + 1
    for start in range(0, len(data), size):
        if not transport.closed:
            connection.data_received(data[start : start + size])
            await asyncio.sleep(0)
    turns = 0
    while connection.task is not None and turns < TURNS:
        await asyncio.sleep(0)
        turns += 1
    status = transport.sent[:13]
    transport.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if failed or connection.task is not None or server.connections:
        raise AssertionError(f"left behind: {failed}, {connection.task}, {server.connections}")
    if status and (not status.startswith(b"HTTP/1.1 ") or status.startswith(b"HTTP/1.1 500")):
        raise AssertionError(f"answered with {status!r}")
