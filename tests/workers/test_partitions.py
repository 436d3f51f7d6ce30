"""Paths that swallow, delay or lose what is sent between a frontend and a worker: nothing is stuck, nothing is said twice.

The path is a relay on loopback, so that no privileges are needed. It keeps the order, as TCP does; a packet that is lost
comes late, and holds up those behind it. Where we may make devices, a path of packets shows what the kernels make of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from launch.recipe import Kind
from tests.packets import can_carry_packets, packets_to
from tests.workers.test_request_plane import Plane, Worker, pieces, plane, question
from workers.frontend.exchange import Relay, answer

__all__ = ["plane"]  # the fixture

STALL_S = 2.0  # of the fixture
TOKENS = 60


class Path:
    """A relay to a worker: `open` is cleared while packets vanish; each is late by what `delay_s` returns."""

    def __init__(self, port: int) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.delay_s: Callable[[], float] = lambda: 0.0
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """The path; yields the port that leads to the worker."""
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        try:
            yield int(server.sockets[0].getsockname()[1])
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for pair in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._pass_on(*pair))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """In order: what is late holds up what is behind it, but not for longer than it is late itself."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(due - time.monotonic())
                await self.open.wait()
                writer.write(data)

        delivering = asyncio.create_task(deliver())
        try:
            while data := await reader.read(1 << 16):
                queue.put_nowait((time.monotonic() + self.delay_s(), data))
        except ConnectionError:
            pass
        finally:
            delivering.cancel()
            writer.close()


@contextlib.asynccontextmanager
async def behind(plane: Plane, worker: Worker) -> AsyncIterator[Path]:
    """Lead the frontend to a worker over a path that can be disturbed."""
    path = Path(int(worker.card.address.rpartition(":")[2]))
    async with path.serving() as port:
        for link in list(plane.links):
            assert link.card.instance != worker.card.instance, "it is linked already"
        worker.card = msgspec.structs.replace(worker.card, address=f"tcp://127.0.0.1:{port}")
        plane.links.update({item.card.member: item.card for item in plane.workers})
        yield path


def unlinked(plane: Plane, interval_s: float) -> Worker:
    """A worker that the frontend has not been told of yet."""
    number = len(plane.workers)
    worker = Worker(Kind.AGGREGATED, plane._base + 100 + number, f"far{number}", plane._model, interval_s)
    plane.workers.append(worker)
    return worker


async def test_a_path_that_swallows_everything_costs_the_stall_timeout_and_no_token(plane: Plane) -> None:
    """No connection breaks, no error comes. The stream goes on elsewhere; what arrives when the path is whole again is too late
    to be said twice; and the worker is asked again.
    """
    far = unlinked(plane, interval_s=0.02)
    async with behind(plane, far) as path:
        await plane.ready(1)
        asked = question(tokens=7, max_tokens=TOKENS)
        written: list[bytes] = []
        moments: list[float] = []

        def write(data: bytes) -> None:
            written.append(data)
            moments.append(time.monotonic())

        task = asyncio.create_task(answer(plane.pool, asked, Relay(write)))
        while len(written) < 10:
            await asyncio.sleep(0.005)
        near = plane.add()
        await plane.ready(2)
        path.open.clear()
        done = await asyncio.wait_for(task, STALL_S + 3)
        after = len(written)
        others = [await asyncio.wait_for(answer(plane.pool, asked, Relay(lambda data: None)), 1) for _ in range(4)]
        path.open.set()
        await plane.ready(2)
        async with asyncio.timeout(5):
            while far.server.streams:
                await asyncio.sleep(0.01)
        alone = b"".join([data async for data in pieces(near, asked)])

    assert b"".join(written) + done.data == alone
    assert len(written) == after
    assert done.completion_tokens == TOKENS
    assert max(later - sooner for sooner, later in itertools.pairwise(moments)) < STALL_S + 1.5
    assert [item.completion_tokens for item in others] == [TOKENS] * 4


@pytest.mark.parametrize("kind", ["late", "lossy"])
async def test_a_bad_path_is_slow_and_nothing_else(plane: Plane, kind: str) -> None:
    """200 ms for everything, or one packet in twenty lost and sent again after 300 ms: right answers, and nobody is given up."""
    far = unlinked(plane, interval_s=0.01)
    rng = random.Random(5)
    async with behind(plane, far) as path:
        path.delay_s = (lambda: 0.2) if kind == "late" else (lambda: 0.3 if rng.random() < 0.05 else 0.0)
        await plane.ready(1)
        asked = question(tokens=9, max_tokens=TOKENS)
        alone = b"".join([data async for data in pieces(far, asked)])
        written: list[list[bytes]] = [[] for _ in range(8)]
        dones = await asyncio.wait_for(
            asyncio.gather(*(answer(plane.pool, asked, Relay(item.append)) for item in written)), 20
        )

    assert [b"".join(item) + done.data for item, done in zip(written, dones, strict=True)] == [alone] * 8
    assert len(plane.legs) == 8


@pytest.mark.skipif(not can_carry_packets(), reason="needs root, iproute2 and /dev/net/tun")
async def test_packets_out_of_order_lost_and_twice_change_no_answer(plane: Plane) -> None:
    """Of the packets between a frontend and its worker a quarter is overtaken, one in twenty is lost and one in ten comes twice:
    the kernels make a stream of it that is only slower. Every client has its answer once, from the one worker.
    """
    far = unlinked(plane, interval_s=0.01)
    rng = random.Random(6)

    def fate() -> tuple[float, ...]:
        late = 0.03 * rng.random() if rng.random() < 0.25 else 0.0
        kind = rng.random()
        return () if kind < 0.05 else (late, 0.02) if kind < 0.15 else (late,)

    async with packets_to(int(far.card.address.rpartition(":")[2])) as (packets, address):
        far.card = msgspec.structs.replace(far.card, address=f"tcp://{address}")
        plane.links.update({far.card.member: far.card})
        await plane.ready(1)
        asked = question(tokens=9, max_tokens=TOKENS)
        alone = b"".join([data async for data in pieces(far, asked)])
        packets.fate = fate
        written: list[list[bytes]] = [[] for _ in range(8)]
        dones = await asyncio.wait_for(
            asyncio.gather(*(answer(plane.pool, asked, Relay(item.append)) for item in written)), 20
        )
        packets.fate = lambda: (0.0,)
    print(f"{packets.passed} packets, {packets.overtaken} overtaken, {packets.lost} lost, {packets.doubled} doubled")

    assert [b"".join(item) + done.data for item, done in zip(written, dones, strict=True)] == [alone] * 8
    assert [done.completion_tokens for done in dones] == [TOKENS] * 8
    assert len(plane.legs) == 8
    assert min(packets.overtaken, packets.lost, packets.doubled) > 0


async def test_a_worker_that_etcd_has_forgotten_is_asked_as_long_as_it_is_heard(plane: Plane) -> None:
    """Cut off from the control plane alone it loses its lease, and no request."""
    plane.add()
    await plane.ready(1)
    plane.links.update({})
    await asyncio.sleep(STALL_S + 0.5)
    done = await asyncio.wait_for(answer(plane.pool, question(), Relay(lambda data: None)), 2)

    assert done.completion_tokens == 16
    assert [link.listed for link in plane.links] == [False]
