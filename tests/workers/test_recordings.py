"""Recordings on the request plane, with echo engines: what a worker says is passed on as it comes, and never said twice."""

from __future__ import annotations

import asyncio

import pytest

from launch.recipe import Kind
from tests.workers.test_request_plane import Plane, plane
from workers.frontend.errors import ApiError
from workers.frontend.exchange import call
from workers.frontend.wishes import Wishes
from workers.runtime import speech, wire

assert plane  # the fixture
FILE = bytes(3_000_000)


def upload(stream: bool) -> bytes:
    """A recording."""
    return speech.encode(speech.Recording([("language", "de")], FILE, "a.wav", stream))


async def asked(plane: Plane, said: list[bytes], stream: bool = True) -> wire.Called:
    """Have it written down by whoever is there."""
    return await call(plane.pool, Kind.AGGREGATED, "r", "transcriptions", upload(stream), "", Wishes(), said.append)


async def test_a_recording_reaches_the_worker_whole(plane: Plane) -> None:
    """And is answered whole."""
    plane.add()
    await plane.ready(1)
    said: list[bytes] = []
    called = await asked(plane, said, stream=False)

    assert called.body == b'{"text":"3000000 bytes of a.wav"}'
    assert said == []


async def test_a_stream_is_passed_on_as_it_comes(plane: Plane) -> None:
    """In order, and before the last word."""
    plane.add(interval_s=0.2)
    await plane.ready(1)
    said: list[bytes] = []
    task = asyncio.create_task(asked(plane, said))
    async with asyncio.timeout(10):
        while not said:
            await asyncio.sleep(0.01)
    assert not task.done()
    called = await task
    events = b"".join(said)

    assert events.count(b"data: ") == 5
    assert events.endswith(b"data: [DONE]\n\n")
    assert (called.status, called.body) == (200, b"")


async def test_a_worker_that_dies_before_its_first_word_costs_another_attempt(plane: Plane) -> None:
    """Nobody has heard anything yet."""
    first = plane.add()
    await plane.ready(1)
    heard = asyncio.Event()

    async def silent(*unused: object) -> None:
        heard.set()
        await asyncio.Event().wait()

    first.engine.call = silent  # type: ignore[method-assign, assignment]  # it never answers
    said: list[bytes] = []
    task = asyncio.create_task(asked(plane, said))
    async with asyncio.timeout(10):
        await heard.wait()
    plane.add()
    await plane.ready(2)
    first.die()
    await task

    assert b"".join(said).endswith(b"data: [DONE]\n\n")
    assert b"".join(said).count(b"3000000") == 1


async def test_a_worker_that_dies_in_the_middle_is_told_and_nothing_is_said_again(plane: Plane) -> None:
    """A second worker is there, and would begin from nothing."""
    first = plane.add(interval_s=0.3)
    await plane.ready(1)
    said: list[bytes] = []
    task = asyncio.create_task(asked(plane, said))
    async with asyncio.timeout(10):
        while not said:
            await asyncio.sleep(0.01)
    plane.add()
    await plane.ready(2)
    first.die()
    with pytest.raises(ApiError) as lost:
        await task

    assert lost.value.status == 503
    assert b"".join(said).count(b"3000000") == 1


async def test_who_leaves_is_heard_by_the_worker(plane: Plane) -> None:
    """It writes nothing down for nobody."""
    worker = plane.add(interval_s=30.0)
    await plane.ready(1)
    task = asyncio.create_task(asked(plane, []))
    await worker.busy()
    task.cancel()
    async with asyncio.timeout(10):
        while worker.server.streams:
            await asyncio.sleep(0.01)
