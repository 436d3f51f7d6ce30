"""vLLM's own publisher of KV events, and ours that reads it: nothing is missed that can be had."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import zmq

from slurm import ports
from workers.engine.kv_ledger import Ledger
from workers.engine.kv_source import EventSource

# Nightly for the ten seconds that the import of vLLM takes; torch warns while it is imported.
pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SIZE = 4


@pytest.fixture
def base() -> int:
    """The first port of a free block."""
    with ports.claim("kv-source", os.getpid()) as block:
        return block.base


class Engine:
    """The publisher of one rank of vLLM; `store` tells of one more block of a chain."""

    def __init__(self, base: int, buffer_steps: int = 1000) -> None:
        from vllm.distributed.kv_events import ZmqEventPublisher

        self.where = (f"tcp://127.0.0.1:{base + 1}", f"tcp://127.0.0.1:{base + 2}")
        bound = [address.replace("127.0.0.1", "*") for address in self.where]
        self._publisher = ZmqEventPublisher(0, bound[0], bound[1], buffer_steps, topic="kv")
        self.blocks = 0

    def store(self) -> None:
        """One batch with one block."""
        from vllm.distributed.kv_events import BlockStored, EventBatch

        self.blocks += 1
        event = BlockStored(
            block_hashes=[1000 + self.blocks],
            parent_block_hash=999 + self.blocks if self.blocks > 1 else None,
            token_ids=[self.blocks] * SIZE,
            block_size=SIZE,
            lora_id=None,
            medium="GPU",
            lora_name=None,
            group_idx=0,
            kv_cache_spec_kind="full_attention",
        )
        self._publisher.publish(EventBatch(ts=0.0, events=[event]))

    def close(self) -> None:
        """End it."""
        self._publisher.shutdown()


@contextlib.asynccontextmanager
async def reading(engine: Engine) -> AsyncIterator[tuple[EventSource, Ledger]]:
    """Our side of it."""
    context: zmq.Context[Any] = zmq.Context()
    ledger = Ledger("a", 0, SIZE)
    source = EventSource(context, *engine.where, "kv", ledger)
    task = asyncio.create_task(source.run())
    try:
        yield source, ledger
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        context.term()


async def comes(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.02)


async def test_blocks_of_before_and_during_the_subscription_are_all_there(base: int) -> None:
    """Published before anybody listened, while the connection was made, and after."""
    engine = Engine(base)
    try:
        for _ in range(5):
            engine.store()
        async with reading(engine) as (source, ledger):
            assert "are not heard" in ledger.trouble
            for _ in range(20):
                engine.store()
                await asyncio.sleep(0.01)
            await comes(lambda: ledger.blocks() == 25 and not ledger.trouble)
            assert source.lost == 0
    finally:
        engine.close()


async def test_what_nobody_remembers_is_given_up(base: int) -> None:
    """An engine that has forgotten its first batches: the picture begins anew, and goes on with what comes."""
    engine = Engine(base, buffer_steps=3)
    try:
        for _ in range(10):
            engine.store()
        await asyncio.sleep(0.3)
        async with reading(engine) as (source, ledger):
            await comes(lambda: source.lost == 7)
            assert ledger.trouble == ""
            engine.blocks = 0
            engine.store()
            await comes(lambda: ledger.blocks() == 1)
    finally:
        engine.close()
