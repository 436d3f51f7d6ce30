"""Prompts that a worker makes: the first leg makes them, the later ones get them, whoever is lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from launch.recipe import Kind
from tests.workers.test_request_plane import RENDER, Plane, Worker, plane
from workers.engine.base import Ask, Piece
from workers.frontend.exchange import Question, Relay, answer

assert plane  # the fixture
SOURCE = b'{"messages":[{"role":"user","content":"the river"}]}'
QUESTION = Question(request_id="r", prompt=b"", render=RENDER, source=SOURCE, guess=9, media=True, max_tokens=8)


@pytest.fixture
def asks(plane: Plane) -> dict[str, list[Ask]]:
    """What each worker's engine was asked, by kind, once `spied` was called for it."""
    return {}


def spied(worker: Worker, asks: dict[str, list[Ask]]) -> Worker:
    """The same worker; its engine notes what it generates for."""
    generate = worker.engine.generate

    async def noted(ask: Ask) -> AsyncIterator[Piece]:
        asks.setdefault(str(worker.card.kind), []).append(ask)
        async for piece in generate(ask):
            yield piece

    worker.engine.generate = noted  # type: ignore[method-assign]  # the echo engine itself answers
    return worker


@pytest.fixture
def ids(tiny_model: Path) -> list[int]:
    """The prompt that an echo engine makes of the source."""
    found: list[int] = Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode(SOURCE.decode()).ids
    return found


async def test_one_worker_makes_the_prompt_and_counts_it(plane: Plane, ids: list[int]) -> None:
    """The frontend does not know its length before."""
    plane.add()
    await plane.ready(1)
    done = await answer(plane.pool, QUESTION, Relay(lambda data: None))

    assert (done.prompt_tokens, done.completion_tokens) == (len(ids), 8)


async def test_the_prefill_makes_the_prompt_and_the_decode_gets_its_ids(
    plane: Plane, asks: dict[str, list[Ask]], ids: list[int]
) -> None:
    """And not the messages: nothing is fetched or decoded again."""
    plane.pool.disaggregated = True
    spied(plane.add(Kind.PREFILL), asks)
    spied(plane.add(Kind.DECODE), asks)
    await plane.ready(2)
    done = await answer(plane.pool, QUESTION, Relay(lambda data: None))

    assert plane.legs == [Kind.PREFILL, Kind.DECODE]
    assert [(kind, ask.prompt, ask.source) for kind, (ask,) in asks.items()] == [
        ("prefill", ids, SOURCE),
        ("decode", ids, b""),
    ]
    assert (done.prompt_tokens, done.completion_tokens) == (len(ids), 8)


async def test_an_encode_engine_makes_the_prompt_for_all_that_follow(
    plane: Plane, asks: dict[str, list[Ask]], ids: list[int]
) -> None:
    """Three legs for media; a prompt without any goes past it."""
    plane.pool.disaggregated = True
    for kind in (Kind.ENCODE, Kind.PREFILL, Kind.DECODE):
        spied(plane.add(kind), asks)
    await plane.ready(3)
    await answer(plane.pool, QUESTION, Relay(lambda data: None))

    assert plane.legs == [Kind.ENCODE, Kind.PREFILL, Kind.DECODE]
    assert [(kind, ask.prompt, ask.source) for kind, (ask,) in asks.items()] == [
        ("encode", ids, SOURCE),
        ("prefill", ids, b""),
        ("decode", ids, b""),
    ]
    plane.legs.clear()
    await answer(plane.pool, replace(QUESTION, media=False), Relay(lambda data: None))

    assert plane.legs == [Kind.PREFILL, Kind.DECODE]


async def test_without_encode_engines_whoever_computes_the_prompt_encodes(plane: Plane, ids: list[int]) -> None:
    """The only one is lost in the middle of it; the request is answered all the same."""
    encoder = plane.add(Kind.ENCODE)
    plane.add(Kind.AGGREGATED)
    await plane.ready(2)
    stuck = asyncio.Event()

    async def never(ask: Ask) -> AsyncIterator[Piece]:
        stuck.set()
        await asyncio.sleep(60)
        yield Piece((), "", "length")

    encoder.engine.generate = never  # type: ignore[method-assign]  # an engine that is busy when its worker is killed
    task = asyncio.create_task(answer(plane.pool, QUESTION, Relay(lambda data: None)))
    await asyncio.wait_for(stuck.wait(), 5)
    encoder.die()
    done = await asyncio.wait_for(task, 5)

    assert (done.prompt_tokens, done.completion_tokens) == (len(ids), 8)
    assert plane.legs == [Kind.ENCODE, Kind.AGGREGATED]


async def test_an_answer_goes_on_elsewhere_from_the_same_source(plane: Plane, ids: list[int]) -> None:
    """The next worker makes the prompt again; each token comes once, and each is counted once."""
    plane.add(interval_s=0.0)
    plane.add(interval_s=0.02)
    await plane.ready(2)
    asked = replace(QUESTION, max_tokens=40)
    whole: list[bytes] = []
    alone = await answer(plane.pool, asked, Relay(whole.append))
    written: list[bytes] = []
    task = asyncio.create_task(answer(plane.pool, asked, Relay(written.append)))
    while len(written) < 5:
        await asyncio.sleep(0.01)
    plane.workers[1].die()
    done = await asyncio.wait_for(task, 5)

    assert b"".join(written) + done.data == b"".join(whole) + alone.data
    assert (done.prompt_tokens, done.completion_tokens) == (len(ids), 40)
