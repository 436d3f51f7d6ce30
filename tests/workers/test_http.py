"""The HTTP edge over a real socket: whatever comes in, it answers in HTTP or closes, and the next client is served."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workers.frontend import http
from workers.frontend.errors import error_body
from workers.frontend.http import Connection, Request, Server
from workers.frontend.limits import ConnectionLimits

WHOLE = b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
BODY_LIMIT = 1000
Exchange = Callable[[list[bytes]], Awaitable[bytes]]


@asynccontextmanager
async def serving(**limits: float) -> AsyncIterator[tuple[str, int]]:
    """A server that answers every request with its body; yields where it listens."""

    async def handle(request: Request, connection: Connection) -> None:
        connection.respond(200, request.body)

    server = Server(handle, error_body, BODY_LIMIT, ConnectionLimits(**limits))  # type: ignore[arg-type]
    listener = await asyncio.get_running_loop().create_server(server.protocol, "127.0.0.1", 0)
    sweeper = asyncio.create_task(server.keep())
    try:
        yield listener.sockets[0].getsockname()[:2]
    finally:
        sweeper.cancel()
        listener.close()
        for connection in list(server.connections):
            connection.close()
        await server.wait_closed(2)
        assert not server.connections


async def said(at: tuple[str, int], parts: list[bytes], leaves: bool = True) -> bytes:
    """Send these parts one by one; returns all that the server said. A client that leaves closes its side at once."""
    reader, writer = await asyncio.open_connection(*at)
    heard = bytearray()

    async def listen() -> None:
        while part := await reader.read(4096):
            heard.extend(part)

    listening = asyncio.create_task(listen())
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if leaves:
            writer.write_eof()
    except OSError:  # the server has heard enough
        pass
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(listening, 5)
    writer.close()
    return bytes(heard)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    """The data, cut there."""
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


requests = st.builds(
    lambda method, path, headers, body: (
        b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, path, b"".join(b"%b: %b\r\n" % header for header in headers), body)
    ),
    st.sampled_from([b"GET", b"POST", b"HEAD", b"OPTIONS", b"PRI", b"get", b""]),
    st.sampled_from([b"/echo", b"/", b"*", b"/../../etc/passwd", b"/%00%ff", b"http://h/x", b"\xff"]),
    st.lists(
        st.tuples(
            st.sampled_from(
                [b"Host", b"Content-Length", b"Transfer-Encoding", b"Expect", b"Upgrade", b"Connection", b"X"]
            ),
            st.sampled_from(
                [b"5", b"-1", b"1e9", b"99999999999999999999", b"chunked", b"100-continue", b"h2c", b"\x00", b""]
            ),
        ),
        max_size=5,
    ),
    st.sampled_from([b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\n", b"-1\r\n", b"", b"\x00" * 50]),
)


@settings(max_examples=60)
@example([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], [])
@example(
    [b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"],
    [],
)
@example([b"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n\x00\x01"], [20])
@given(
    st.lists(st.one_of(requests, st.binary(max_size=200)), min_size=1, max_size=4), st.lists(st.integers(0), max_size=4)
)
def test_noise_gets_an_answer_in_http_or_none_and_harms_nobody(messages: list[bytes], cuts: list[int]) -> None:
    """However it is cut into packets; the connection ends, and the next client is served."""

    async def trial() -> None:
        async with serving() as at:
            answer = await said(at, split(b"".join(messages), cuts))
            assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
            assert b" 500 " not in answer.partition(b"\r\n")[0]
            after = await said(at, [WHOLE.replace(b"Host: h", b"Connection: close")], leaves=False)
            assert after.startswith(b"HTTP/1.1 200 OK\r\n")
            assert after.endswith(b"\r\n\r\nhello")

    asyncio.run(trial())


@settings(max_examples=50)
@given(st.lists(st.integers(0), max_size=6), st.integers(1, 3))
def test_a_request_is_the_same_however_it_is_cut(cuts: list[int], count: int) -> None:
    """And so are several on one connection, in their order."""

    async def trial() -> None:
        async with serving() as at:
            last = WHOLE.replace(b"Host: h\r\n", b"Host: h\r\nConnection: close\r\n")
            answer = await said(at, split(WHOLE * (count - 1) + last, cuts), leaves=False)
            assert answer.count(b"HTTP/1.1 200 OK\r\n") == answer.count(b"hello") == count

    asyncio.run(trial())


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        pytest.param(
            [b"POST /echo HTTP/1.1\r\nContent-Length: 1001\r\n\r\n"], b"413", id="a body that says it is too large"
        ),
        pytest.param(
            [
                b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"3e8\r\n%b\r\n" % (b"x" * 1000),
                b"1\r\nx\r\n",
            ],
            b"413",
            id="a body that turns out too large",
        ),
        pytest.param([b"GET / HTTP/1.1\r\n", b"X: %b\r\n\r\n" % (b"x" * 70_000)], b"431", id="a head without end"),
        pytest.param([b"GET /%b HTTP/1.1\r\n\r\n" % (b"x" * 70_000)], b"431", id="a path without end"),
        pytest.param([b"X: y\r\n" * 20_000], b"400", id="no request at all"),
        pytest.param([b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 20_000, b"\r\n"], b"431", id="headers without end"),
    ],
)
async def test_what_is_too_large_is_refused(parts: list[bytes], status: bytes) -> None:
    """With the status that says so, before it is kept."""
    async with serving() as at:
        assert (await said(at, parts, leaves=False)).split()[1] == status


@pytest.mark.parametrize(
    ("parts", "answer"),
    [
        pytest.param([b"POST /echo HTTP/1.1\r\nContent-Le"], b"HTTP/1.1 408 ", id="half a head"),
        pytest.param([WHOLE[:-1]], b"HTTP/1.1 408 ", id="half a body"),
        pytest.param([b""], b"", id="nothing"),
    ],
)
async def test_a_client_that_does_not_go_on_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, parts: list[bytes], answer: bytes
) -> None:
    """Or it would hold its connection for ever; one that has sent a whole request is answered first."""
    monkeypatch.setattr(http, "CHECK_S", 0.05)
    async with serving(request_s=0.2, keep_alive_s=0.2) as at:
        reader, writer = await asyncio.open_connection(*at)
        writer.write(parts[0])
        async with asyncio.timeout(5):
            got = await reader.read()
        writer.close()

    assert got.startswith(answer)
    assert bool(got) is bool(answer)


async def test_a_closed_connection_goes_with_the_last_that_knew_of_it() -> None:
    """And not when Python next looks for cycles: the bodies of hundreds of requests would wait for that, of 60 MB each or not."""
    gc.collect()
    gc.disable()
    try:
        async with serving() as at:
            for _ in range(3):
                await said(at, [WHOLE])
            await asyncio.sleep(0)
            left = [
                item for item in gc.get_objects() if type(item) in (Connection, Request)
            ]  # isinstance would ask objects of others for their class
    finally:
        gc.enable()

    assert left == []
