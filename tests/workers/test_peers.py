"""A decode engine turns to no prefill engine that does not answer: one that is dead would hold up all others for seconds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio

from slurm import ports
from workers.engine import peers
from workers.engine.base import LostError


@pytest.fixture
def port() -> int:
    """A port that nobody listens at."""
    with ports.claim("peers", os.getpid()) as block:
        free = block.base + 1
    return free


@contextlib.asynccontextmanager
async def listener(port: int) -> AsyncIterator[list[bytes]]:
    """As vLLM's side channel: answers every question; yields the questions."""
    asked: list[bytes] = []
    socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    socket.bind(f"tcp://127.0.0.1:{port}")

    async def answer() -> None:
        while True:
            identity, empty, question = await socket.recv_multipart()
            asked.append(question)
            await socket.send_multipart([identity, empty, b"metadata"])

    task = asyncio.create_task(answer())
    try:
        yield asked
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        socket.close(0)


async def test_a_peer_that_answers_is_asked_once_for_a_while(port: int) -> None:
    """However many requests come for it at the same moment."""
    known = peers.Peers()
    async with listener(port) as asked:
        await asyncio.gather(*(known.check(("127.0.0.1", port)) for _ in range(20)))
        await known.check(("127.0.0.1", port))

    assert asked == [peers.QUESTION]


async def test_a_peer_that_is_not_there_is_lost_within_its_second_and_asked_again(port: int) -> None:
    """Each of the requests that wait for it; once it is there it is used."""
    known = peers.Peers()
    begun = time.monotonic()
    results = await asyncio.gather(*(known.check(("127.0.0.1", port)) for _ in range(5)), return_exceptions=True)

    assert all(isinstance(result, LostError) for result in results)
    assert time.monotonic() - begun < 2 * peers.ANSWER_S
    async with listener(port):
        await known.check(("127.0.0.1", port))


async def test_a_dead_peer_does_not_hold_up_another(port: int) -> None:
    """They are asked at the same time."""
    known = peers.Peers()
    async with listener(port):
        dead = asyncio.create_task(known.check(("127.0.0.1", port + 1)))
        begun = time.monotonic()
        await known.check(("127.0.0.1", port))
        took = time.monotonic() - begun
        with pytest.raises(LostError, match="does not answer"):
            await dead

    assert took < peers.ANSWER_S / 2
