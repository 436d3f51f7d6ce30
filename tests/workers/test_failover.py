"""A worker that is lost at any moment costs the client nothing: no token lost, none twice, and usage to the token."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from launch.compose import read
from launch.errors import ConfigError
from launch.recipe import Kind
from tests.chaos.faults import can_cut
from tests.workers.test_request_plane import Plane, Worker, pieces, plane, question
from workers.engine.base import Ask, Piece
from workers.engine.echo import EchoEngine
from workers.frontend.errors import ApiError
from workers.frontend.exchange import Relay, answer

__all__ = ["plane"]  # the fixture

TOKENS = 40


class Held(EchoEngine):
    """An engine whose prefills wait until they are let go."""

    def __init__(self, engine: EchoEngine) -> None:
        self.__dict__ = engine.__dict__
        self.begun = asyncio.Event()
        self.let_go = asyncio.Event()

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """As an echo, after a while."""
        if ask.prefill_only:
            self.begun.set()
            await self.let_go.wait()
        async for piece in super().generate(ask):
            yield piece


async def kill(worker: Worker) -> None:
    """As by SIGKILL."""
    worker.die()


async def cut(worker: Worker) -> None:
    """Break its connections; the worker itself lives on."""
    port = worker.card.address.rpartition(":")[2]
    await asyncio.to_thread(subprocess.run, ["ss", "-K", "dport", "=", port], check=False, capture_output=True)


@pytest.mark.parametrize("at", [0, 1, 2, 7, 20, TOKENS - 2, TOKENS - 1])
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(kill, id="killed"),
        pytest.param(cut, id="cut", marks=pytest.mark.skipif(not can_cut(), reason="needs root and iproute2")),
    ],
)
async def test_a_worker_lost_at_any_token_costs_none(
    plane: Plane, fault: Callable[[Worker], Awaitable[None]], at: int
) -> None:
    """The bytes of the client are those of one undisturbed worker, and so is the count."""
    first = plane.add(interval_s=0.01)
    second = plane.add()
    await plane.ready(2)
    asked = question(tokens=7, max_tokens=TOKENS)
    alone = b"".join([data async for data in pieces(second, asked)])
    written: list[bytes] = []
    task = asyncio.create_task(answer(plane.pool, asked, Relay(written.append)))
    await first.busy()
    while len(written) < at:
        await asyncio.sleep(0.001)
    await fault(first)
    done = await asyncio.wait_for(task, 5)

    assert b"".join(written) + done.data == alone
    assert (done.prompt_tokens, done.completion_tokens) == (7, TOKENS)


@pytest.mark.parametrize("attempts", [1, 2, 4])
async def test_a_request_costs_no_more_workers_than_the_recipe_allows(plane: Plane, attempts: int) -> None:
    """Then it ends with an error that a client may act on."""
    plane.pool.attempts = attempts
    workers = [plane.add(interval_s=60) for _ in range(5)]
    await plane.ready(5)
    task = asyncio.create_task(answer(plane.pool, question(), Relay(lambda data: None)))
    for _ in range(attempts):
        async with asyncio.timeout(5):
            while not (busy := [worker for worker in workers if worker.server.streams]):
                await asyncio.sleep(0.01)
        busy[0].die()
        workers.remove(busy[0])
    with pytest.raises(ApiError, match="the worker was lost") as error:
        await asyncio.wait_for(task, 5)

    assert error.value.status == 503
    assert plane.legs == [Kind.AGGREGATED] * attempts


def test_attempts_are_the_recipes() -> None:
    """failover.max_attempts, three by default; none at all makes no sense."""
    assert read(["+recipe=tiny_agg"]).recipe.failover.max_attempts == 3
    assert read(["+recipe=tiny_agg", "failover.max_attempts=1"]).recipe.failover.max_attempts == 1
    with pytest.raises(ConfigError, match=r"failover\.max_attempts is 1 .* got 0"):
        read(["+recipe=tiny_agg", "failover.max_attempts=0"])


@pytest.mark.parametrize("moment", ["before", "during", "after"])
async def test_a_lost_prefill_worker_costs_nothing(plane: Plane, moment: str) -> None:
    """Before it was asked, while it computes, and when its result was passed on: the answer is the same."""
    plane.pool.disaggregated = True
    first, second = plane.add(Kind.PREFILL), plane.add(Kind.PREFILL)
    decode = plane.add(Kind.DECODE, interval_s=0.01)
    await plane.ready(3)
    asked = replace(question(tokens=9, max_tokens=20), request_id=moment)
    alone = b"".join([data async for data in pieces(decode, asked)])
    held = Held(first.engine)
    first.server._engine = held
    if moment == "before":
        first.die()
    if moment == "after":
        held.let_go.set()
    written: list[bytes] = []
    task = asyncio.create_task(answer(plane.pool, asked, Relay(written.append)))
    if moment == "during":
        await asyncio.wait_for(held.begun.wait(), 5)
        first.die()
    if moment == "after":
        while not written:
            await asyncio.sleep(0.001)
        first.die()
    done = await asyncio.wait_for(task, 5)

    assert b"".join(written) + done.data == alone
    assert done.completion_tokens == 20
    assert second.engine.load.running == 0
