"""One answer: the legs of a request over the workers, from token ids to the last byte.

An aggregated deployment has one leg. A disaggregated one has two: a prefill worker computes the prompt and returns the
parameters of its KV cache, a decode worker pulls that cache and answers. A prefill's result is used once and in time, or
not at all: vLLM answers a late or second pull with another prompt's tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from launch.recipe import Kind
from workers.frontend.errors import ApiError
from workers.frontend.links import LOST, Link, Links
from workers.frontend.router import Mode
from workers.runtime import wire

L = TypeVar("L", wire.End, wire.Prefilled)
ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt and how it is to be answered."""

    request_id: str
    prompt: bytes
    sampling: dict[str, Any]
    render: wire.Render
    priority: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The end of an answer; `data` is the rest of its bytes."""

    data: bytes
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Pool:
    """The usable workers, by what they are for."""

    def __init__(
        self, links: Links, choose: dict[Kind, Mode], disaggregated: bool, on_leg: Callable[[Kind], None]
    ) -> None:
        self._links = links
        self._choose = choose
        self.disaggregated = disaggregated
        self.on_leg = on_leg

    def usable(self, kind: Kind) -> list[Link]:
        """The workers of a kind that may be asked now."""
        return [link for link in self._links if link.card.kind is kind and link.usable]

    def pick(self, kind: Kind, avoid: set[str]) -> Link:
        """A worker for a leg, not among those of `avoid` (instances) unless there is no other.

        Raises:
            ApiError: 503, there is none.
        """
        usable = self.usable(kind)
        candidates = [link for link in usable if link.card.instance not in avoid] or usable
        if not candidates:
            raise ApiError(503, f"no {kind} worker is ready", retry_after_s=1)
        self.on_leg(kind)
        return candidates[self._choose[kind](candidates)]

    @property
    def missing(self) -> list[Kind]:
        """The kinds of worker that are needed to answer and not there."""
        needed = (Kind.PREFILL, Kind.DECODE) if self.disaggregated else (Kind.AGGREGATED,)
        return [kind for kind in needed if not self.usable(kind)]


async def answer(pool: Pool, question: Question, write: Callable[[bytes], None]) -> Answered:
    """Get one question answered; bytes of a stream go to `write` as they come.

    A worker that is lost before anything was written costs another attempt on another worker. Cancelling this coroutine
    cancels the request at the workers.

    Raises:
        ApiError: The request was refused, or no attempt succeeded.
    """
    avoid: set[str] = set()
    for attempt in range(ATTEMPTS):
        relay = Relay(write)
        # An engine may still be ending the last attempt under its own id.
        asked = replace(question, request_id=f"{question.request_id}-{attempt}") if attempt else question
        try:
            last = await _attempt(pool, asked, relay, avoid)
        except LegLostError as error:
            if attempt < ATTEMPTS - 1 and not relay.written:
                avoid.add(error.instance)
                continue
            raise ApiError(error.failed.status, error.failed.message, retry_after_s=1) from error
        return Answered(last.data, last.prompt_tokens, last.completion_tokens, last.cached_tokens)
    raise AssertionError("the last attempt returns or raises")


class LegLostError(Exception):
    """A worker could not serve a leg, but another might."""

    def __init__(self, failed: wire.Failed, instance: str) -> None:
        super().__init__(failed.message)
        self.failed = failed
        self.instance = instance


class Relay:
    """The sink of an answering leg: passes bytes on, keeps the ids (for a continuation elsewhere), and ends a future."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.ids = bytearray()
        self.written = False
        self.last: asyncio.Future[wire.End | wire.Prefilled | wire.Failed] = asyncio.get_running_loop().create_future()
        self._write = write

    def feed(self, ids: bytes, data: bytes) -> None:
        """Called for every token: this is the relay's whole work."""
        self.ids += ids
        if data:
            self.written = True
            self._write(data)

    def end(self, last: wire.End | wire.Prefilled | wire.Failed) -> None:
        """The last word on the stream."""
        if not self.last.done():
            self.last.set_result(last)


class Releaser:
    """The sink of a cancelled prefill: a result that was already on its way frees its blocks."""

    def __init__(self, pool: Pool, question: Question) -> None:
        self._pool = pool
        self._question = question

    def feed(self, ids: bytes, data: bytes) -> None:
        """A prefill has no deltas."""

    def end(self, last: wire.End | wire.Prefilled | wire.Failed) -> None:
        """The last word: a result, or that there is none."""
        if isinstance(last, wire.Prefilled):
            _release(self._pool, self._question, last.transfer)


async def _attempt(pool: Pool, question: Question, relay: Relay, avoid: set[str]) -> wire.End:
    if not pool.disaggregated:
        link = pool.pick(Kind.AGGREGATED, avoid)
        return await _run(link, question, relay, wire.Leg.WHOLE, wire.End)
    prefilled = await _prefill(pool, question, avoid)
    try:
        link = pool.pick(Kind.DECODE, avoid)
        if time.time() > prefilled.expires_at:
            raise LegLostError(wire.Failed(0, 503, "the prefill expired, or the nodes' clocks differ", True), "")
    except (ApiError, LegLostError):
        _release(pool, question, prefilled.transfer)
        raise
    # From here on the transfer belongs to the decode worker, which uses it or releases it.
    last = await _run(link, question, relay, wire.Leg.DECODE, wire.End, prefilled)
    # The decode side's own count is unreliable after a pull (vLLM 0.32); the prefill side knows.
    last.cached_tokens = prefilled.cached_tokens
    return last


async def _prefill(pool: Pool, question: Question, avoid: set[str]) -> wire.Prefilled:
    """The prefill leg. When the client leaves during it, its result is released as soon as it is there."""
    link = pool.pick(Kind.PREFILL, avoid)
    unwanted = Releaser(pool, question)
    return await _run(link, question, Relay(lambda data: None), wire.Leg.PREFILL, wire.Prefilled, unwanted=unwanted)


async def _run(
    link: Link,
    question: Question,
    relay: Relay,
    leg: wire.Leg,
    expected: type[L],
    prefilled: wire.Prefilled | None = None,
    unwanted: Releaser | None = None,
) -> L:
    def build(stream: int) -> wire.Generate:
        return wire.Generate(
            stream=stream,
            leg=leg,
            request_id=question.request_id,
            prompt=question.prompt,
            produced=b"",
            sampling=question.sampling,
            render=None if leg is wire.Leg.PREFILL else question.render,
            transfer=prefilled.transfer if prefilled else b"",
            expires_at=prefilled.expires_at if prefilled else 0.0,
            priority=question.priority,
        )

    number = link.open(build, relay)
    if number is None:
        raise LegLostError(LOST, link.card.instance)
    try:
        last = await relay.last
    finally:
        link.cancel(number, unwanted)  # does nothing when the stream has ended
    if isinstance(last, expected):
        return last
    assert isinstance(last, wire.Failed)
    if last.retryable:
        raise LegLostError(last, link.card.instance)
    raise ApiError(last.status, last.message)


def _release(pool: Pool, question: Question, transfer: bytes) -> None:
    """Free the blocks of a prefill that no decode will pull; any decode worker can say so to the prefill worker."""
    for link in pool.usable(Kind.DECODE)[:1]:
        link.release(f"{question.request_id}-release", transfer)
