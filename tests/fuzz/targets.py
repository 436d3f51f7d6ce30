"""What is fuzzed: each target takes any bytes, and raises where a promise is broken.

frames  the decoder of the request plane: a message or a DecodeError, and a message is the same after another turn
http    a connection: whatever comes, in whatever packets, it answers in HTTP or not at all, and nothing of it stays
bodies  what reads the bodies of requests: it can be served, or is an ApiError of the client's; packed ones too
"""

from __future__ import annotations

import asyncio
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
            options(fields)
            msgspec.json.encode(chat.template_variables)
        elif kind == 1:
            completion, fields = parse(body, CompletionRequest)
            completion.check(fields)
            completion.prompts()
            options(fields)
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
