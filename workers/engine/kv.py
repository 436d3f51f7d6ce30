"""A worker's KV events, from its engine to the frontends; a hook of few lines for `workers.engine.__main__`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import zmq

from launch.plan import Member
from launch.recipe import Kind, Recipe
from launch.records import Control
from slurm.places import Place
from workers.engine.arguments import KV_TOPIC, kv_event_sources, role_of
from workers.engine.base import Engine
from workers.engine.echo_cache import CachingEcho
from workers.engine.kv_ledger import Ledger
from workers.engine.kv_publisher import publish_kv
from workers.engine.kv_source import EventSource
from workers.runtime.registry import Card


@asynccontextmanager
async def published(
    recipe: Recipe,
    member: Member,
    place: Place,
    control: Control,
    engine: Engine,
    card: Card,
    context: zmq.Context[Any],
) -> AsyncIterator[Callable[[], None]]:
    """Tell frontends what the engine caches for as long as the block runs, where the recipe asks for it.

    Yields what to call when the engine has dropped its cache: vLLM itself says so with its next step only.
    """
    if not recipe.publishes_kv_events or member.kind in (Kind.EMBEDDING, Kind.ENCODE):
        yield lambda: None
        return
    ledgers = {
        rank: Ledger(card.instance, rank, card.block_size)
        for rank in range(card.dp_first, card.dp_first + card.dp_count)
    }
    sources: list[EventSource] = []
    if isinstance(engine, CachingEcho):
        engine.tell(ledgers)
    else:
        where = kv_event_sources(role_of(recipe, member), member, place)
        sources = [EventSource(context, *where[rank], KV_TOPIC, ledger) for rank, ledger in ledgers.items()]

    def cleared() -> None:
        for source in sources:
            source.translator.cleared()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(source.run(), name="kv-source") for source in sources]
        work = publish_kv(control, recipe.name, member.name, card.instance, ledgers)
        tasks.append(group.create_task(work, name="kv-publisher"))
        yield cleared
        for task in tasks:
            task.cancel()
