"""Two nodes test the way between them over TCP: that it is there, its latency, its rate, and whether their clocks agree.

The answering side listens on one port of its rank's block for as long as the others test. It answers two questions and
keeps nothing: what time is it (`T`), and send me up to so many bytes (`S` and 8 bytes).
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import msgspec

CHUNK = bytes(1 << 18)
MOST_BYTES = 64 << 20
RATE_S = 0.5
PINGS = 5


class Link(msgspec.Struct, kw_only=True):
    """What a rank found on the way to a peer; `skew_s` is the peer's clock minus ours, to half the latency."""

    peer: int
    host: str
    address: str
    error: str | None = None
    latency_ms: float = 0.0
    gbit_per_s: float = 0.0
    skew_s: float = 0.0
    nixl_gbit_per_s: float | None = None
    nixl_error: str | None = None


async def start(address: str, port: int, clock: Callable[[], float] = time.time, pace_s: float = 0.0) -> asyncio.Server:
    """Answer other ranks' tests from now on; `clock` and `pace_s` (between chunks) are for tests of the tests."""
    return await asyncio.start_server(lambda reader, writer: _answer(reader, writer, clock, pace_s), address, port)


async def measure(peer: int, host: str, address: str, port: int, timeout_s: float) -> Link:
    """Test the way to a peer; a failure is in the link's `error`."""
    link = Link(peer=peer, host=host, address=f"{address}:{port}")
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address, port, limit=4 * len(CHUNK))
            link.latency_ms, link.skew_s = await _clock(reader, writer)
            link.gbit_per_s = await _rate(reader, writer)
    except TimeoutError:
        link.error = f"no answer within {timeout_s:g} s"
    except (OSError, EOFError) as error:
        link.error = str(error) or type(error).__name__
    finally:
        if writer:
            writer.transport.abort()
    return link


@contextlib.asynccontextmanager
async def offering(
    address: str, port: int, backend: str, env: Mapping[str, str], log_path: Path
) -> AsyncIterator[None]:
    """Hold a block of memory for others to pull by NIXL, in a process of its own, within the block."""
    with log_path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *_nixl("offer", address, port, backend),
            env=dict(env),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def pull(link: Link, address: str, port: int, backend: str, env: Mapping[str, str], timeout_s: float) -> None:
    """Pull a peer's block by NIXL; what came of it is noted in the link."""
    process = await asyncio.create_subprocess_exec(
        *_nixl("read", address, port, backend, f"{timeout_s:.0f}"),
        env=dict(env),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(2 * timeout_s):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        link.nixl_error = f"nothing after {2 * timeout_s:.0f} s"
        return
    last = said.decode(errors="replace").strip().rpartition("\n")[2]
    try:
        answer = msgspec.json.decode(last, type=dict[str, float])
        link.nixl_gbit_per_s = answer["gbit_per_s"]
        if answer["wrong_bytes"]:
            link.nixl_error = f"{answer['wrong_bytes']:.0f} bytes came wrong"
    except (msgspec.DecodeError, KeyError):
        link.nixl_error = last or f"exit code {process.returncode}"


def _nixl(role: str, address: str, port: int, *more: str) -> list[str]:
    return [sys.executable, "-m", "slurm.nixl_probe", role, address, str(port), *more]


async def _clock(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[float, float]:
    """The least round trip in milliseconds, and the skew that it showed."""
    best, skew = float("inf"), 0.0
    for _ in range(PINGS):
        begun, wall = time.perf_counter(), time.time()
        writer.write(b"T")
        (there,) = struct.unpack("!d", await reader.readexactly(8))
        trip = time.perf_counter() - begun
        if trip < best:
            best, skew = trip, there - (wall + trip / 2)
    return round(best * 1000, 3), round(skew, 4)


async def _rate(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    """Gbit/s from the peer to us, over `MOST_BYTES` or `RATE_S`, whichever ends first."""
    writer.write(b"S" + struct.pack("!q", MOST_BYTES))
    begun, received = time.perf_counter(), 0
    while received < MOST_BYTES and time.perf_counter() - begun < RATE_S:
        data = await reader.read(len(CHUNK))
        if not data:
            raise EOFError("the connection was closed in the middle")
        received += len(data)
    return round(received * 8 / (time.perf_counter() - begun) / 1e9, 3)


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, clock: Callable[[], float], pace_s: float
) -> None:
    try:
        with contextlib.suppress(OSError, EOFError):
            while kind := await reader.read(1):
                if kind == b"T":
                    writer.write(struct.pack("!d", clock()))
                    continue
                (left,) = struct.unpack("!q", await reader.readexactly(8))
                for _ in range(min(left, MOST_BYTES) // len(CHUNK)):
                    writer.write(CHUNK)
                    await writer.drain()
                    if pace_s:
                        await asyncio.sleep(pace_s)
    finally:
        writer.transport.abort()
