"""vLLM's own publisher of KV events, and ours that reads it: nothing is missed that can be had."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import zmq

from slurm import ports
from workers.engine.kv_ledger import Ledger
from workers.engine.kv_source import EventSource, Translator
from workers.runtime.blocks import chain, root
from workers.runtime.kv_events import Tier
from workers.runtime.wire import pack

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


def test_a_host_cache_that_fills_up_is_followed() -> None:
    """vLLM's own manager of offloaded blocks, and its events: what it holds is what the ledger says, hashes being all it tells."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.events import OffloadingEventsTracker
    from vllm.v1.kv_offload.base import OffloadingKVEventsConfig, ReqContext, make_offload_key
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

    manager = CPUOffloadingManager(num_chunks=3, enable_events=True)
    tracker = OffloadingEventsTracker(OffloadingKVEventsConfig(True, False))
    ledger = Ledger("a", 0, SIZE)
    translator = Translator(ledger)
    hashes = [bytes([number]) * 32 for number in range(1, 6)]
    ids = list(range(SIZE * len(hashes)))
    told = {"type": "BlockStored", "parent_block_hash": None, "token_ids": ids, "block_size": SIZE, "medium": "GPU"}
    translator.apply(told | {"block_hashes": [maybe(block) for block in hashes]})
    for number, block in enumerate(hashes):
        request = ReqContext(req_id=str(number))
        key = make_offload_key(block, 0)
        assert manager.prepare_store([key], request) is not None
        manager.complete_store([key], request)
        for event in tracker.take_events(manager.take_events()):
            translator.apply(msgspec.msgpack.decode(msgspec.msgpack.encode(event)))
    names = chain(pack(ids), SIZE, root())
    translator.cleared()

    assert ledger.blocks(Tier.HOST) == 3
    assert [ledger.holds(name) for name in names] == [False, False, True, True, True]


def maybe(block: bytes) -> Any:
    """A block's hash as vLLM tells it."""
    from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

    return maybe_convert_block_hash(BlockHash(block))
