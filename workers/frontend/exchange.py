"""One answer: the legs of a request over the workers, from token ids to the last byte.

An aggregated deployment has one leg. A disaggregated one has two: a prefill worker computes the prompt and returns the
parameters of its KV cache, a decode worker pulls that cache and answers. A prefill's result is used once and in time, or
not at all: vLLM answers a late or second pull with another prompt's tokens. Where it is better (`workers.frontend.local`),
a decode worker computes the prompt itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from launch.recipe import Kind
from workers.frontend.admission import Thresholds
from workers.frontend.book import Key
from workers.frontend.errors import ApiError
from workers.frontend.kv_router import KvBooking
from workers.frontend.links import LOST, Link
from workers.frontend.local import LocalPrefill, Reason
from workers.frontend.pairs import Pairs
from workers.frontend.router import Router
from workers.frontend.wishes import Wishes
from workers.runtime import wire

L = TypeVar("L", wire.End, wire.Prefilled, wire.Called)
SOURCE_LOST = wire.Failed(0, 503, "the prefill worker was lost before its KV cache was passed on", True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt and how it is to be answered; `wire.Generate` says what the fields mean.

    `prompt` is empty where a worker makes it of `source`; `guess` is then how many tokens it is taken for until it is made, and
    `media` whether there is something in it to encode.
    `reads_prompt` asks for something that only the engine that computes the prompt can tell. `restarts` asks for something
    that an answer continued elsewhere would lack, so that it has to begin anew.
    """

    request_id: str
    prompt: bytes
    render: wire.Render
    options: bytes = b"{}"
    max_tokens: int = -1
    priority: int = 0
    adapter: str = ""
    dp_rank: int = -1
    choice: int = 0
    reads_prompt: bool = False
    restarts: bool = False
    trace: dict[str, str] | None = None
    source: bytes = b""
    features: bytes = b""
    guess: int = 0
    media: bool = False
    wishes: Wishes = field(default_factory=Wishes)

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt) // 4 or self.guess

    def rendered(self, prompt: bytes, features: bytes) -> Question:
        """The same with the prompt that a worker has made of its source; itself where none did."""
        return replace(self, prompt=prompt, features=features, source=b"") if prompt else self


@dataclass(frozen=True, slots=True)
class Answered:
    """The end of an answer; `data` is the rest of its bytes."""

    data: bytes
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = -1
    extra: bytes = b""


@dataclass(frozen=True, slots=True)
class Target:
    """A worker, and where it has several data-parallel ranks one of them; -1 for the only one.

    `booking` is the leg in the router's book, where it keeps one.
    """

    link: Link
    rank: int = -1
    booking: KvBooking | None = None

    @property
    def key(self) -> Key:
        """Its instance and rank."""
        card = self.link.card
        return card.instance, max(self.rank, card.dp_first)

    @property
    def member(self) -> str:
        """Its name in the plan."""
        return self.link.card.member

    def tokens(self, question: Question) -> int:
        """Prompt tokens that it has to compute, as far as is known."""
        return self.booking.tokens if self.booking else question.tokens

    @property
    def in_flight(self) -> int:
        """Streams that this frontend has open there."""
        return self.link.in_flight(self.rank)

    @property
    def waiting(self) -> int:
        """Requests that the engine has queued, of all frontends, as last reported."""
        return self.link.waiting


class Pool:
    """The usable workers, by what they are for."""

    def __init__(
        self,
        links: Iterable[Link],
        router: Router,
        disaggregated: bool,
        on_leg: Callable[[Kind], None],
        needed: tuple[Kind, ...] | None = None,
        local: LocalPrefill | None = None,
        on_local: Callable[[Reason], None] = lambda reason: None,
        on_resumed: Callable[[], None] = lambda: None,
        attempts: int = 3,
    ) -> None:
        self._links = links
        self.router = router
        self._needed = needed or ((Kind.PREFILL, Kind.DECODE) if disaggregated else (Kind.AGGREGATED,))
        self._local = local or LocalPrefill()
        self.disaggregated = disaggregated
        self.on_leg = on_leg
        self.on_local = on_local
        self.on_resumed = on_resumed
        self.attempts = attempts
        self.pairs = Pairs()
        self.busy: Callable[[Link], bool] = lambda link: False
        """Whether a worker should get nothing more as long as another one can."""

    def usable(self, kind: Kind, adapter: str = "") -> list[Link]:
        """The workers of a kind that may be asked now, those with the adapter if one is named."""
        return [
            link
            for link in self._links
            if link.card.kind is kind and link.usable and (not adapter or adapter in link.card.adapters)
        ]

    def pick(
        self,
        kind: Kind,
        question: Question,
        avoid: Collection[str],
        fingerprint: str = "",
        computes: bool = True,
        cut: Collection[str] = (),
    ) -> Target:
        """A worker for a leg, not among those of `avoid` (instances) unless there is no other, and those of `cut` last of all.

        Of the others those that are not busy, if there is one.

        With a fingerprint, only workers that may pull a KV cache from a worker of that fingerprint. `computes` says whether
        the prompt is computed there, not pulled.

        Raises:
            ApiError: 503, there is none; or the client's wishes cannot be followed.
        """
        usable = self.usable(kind, question.adapter)
        if fingerprint:
            usable = [link for link in usable if link.card.fingerprint in ("", fingerprint)]
        possible = [link for link in usable if link.card.instance not in cut] or usable
        links = [link for link in possible if link.card.instance not in avoid] or possible
        if not question.wishes.members:  # who names a worker waits for it
            links = [link for link in links if not self.busy(link)] or links
        rank = -1 if kind is Kind.PREFILL else question.dp_rank
        targets = [target for link in links for target in _targets(link, rank)]
        if not targets:
            loaded = f" with the adapter {question.adapter!r}" if question.adapter else ""
            asked = f" with data-parallel rank {rank}" if rank >= 0 else ""
            raise ApiError(503, f"no {kind} worker{loaded}{asked} is ready", retry_after_s=1)
        index, booking = self.router.pick(kind, targets, question, computes)
        return replace(targets[index], booking=booking) if booking else targets[index]

    def local_reason(self, question: Question) -> Reason | None:
        """Why a decode worker should compute this prompt itself; None when a prefill worker should."""
        prefills = self.usable(Kind.PREFILL, question.adapter)
        if not prefills:
            return Reason.NO_PREFILL
        if question.reads_prompt:
            return Reason.READS_PROMPT
        decodes = self.usable(Kind.DECODE, question.adapter)
        if self.unpulled(question).issuperset(link.card.instance for link in prefills):
            return Reason.CUT
        return self._local.reason(
            question.tokens,
            [link.prefilling for link in prefills],
            [link.prefilling for link in decodes],
            lambda: self._cached_tokens(decodes, question),
        )

    def unpulled(self, question: Question) -> set[str]:
        """Instances of prefill workers that no decode worker can pull from."""
        decodes = self.usable(Kind.DECODE, question.adapter)
        found = set()
        for prefill in self.usable(Kind.PREFILL, question.adapter) if self.pairs.any else ():
            card = prefill.card
            could = {link.card.instance for link in decodes if link.card.fingerprint in ("", card.fingerprint)}
            if could and could <= self.pairs.targets(card.instance):
                found.add(card.instance)
        return found

    def _cached_tokens(self, links: list[Link], question: Question) -> int:
        """The most tokens of a prompt that one of these workers caches, as far as is known."""
        kv = self.router.kv
        return kv.cached_tokens([target for link in links for target in _targets(link, -1)], question) if kv else 0

    def crowded(self, question: Question, reason: Reason) -> set[str]:
        """Instances of decode workers that have no room for this prompt."""
        if reason is not Reason.LOAD:
            return set()
        busy = {link.card.instance: link.prefilling for link in self.usable(Kind.DECODE)}
        return {name for name, tokens in busy.items() if not self._local.has_room(question.tokens, tokens)}

    def has_room(self, thresholds: Thresholds) -> bool:
        """Whether a worker of every kind that is there is not busy; what is not there is for `pick` to say."""
        there = [links for kind in self._needed if (links := self.usable(kind))]
        return all(any(not thresholds.busy(link) for link in links) for links in there)

    @property
    def needed(self) -> tuple[Kind, ...]:
        """The kinds of worker that belong to the deployment."""
        return self._needed

    @property
    def troubles(self) -> list[str]:
        """What keeps the router from choosing as the recipe asks, where something does."""
        return self.router.kv.view.troubles if self.router.kv else []

    @property
    def missing(self) -> list[Kind]:
        """The kinds of worker that belong to the deployment and are not there."""
        return [kind for kind in self._needed if not self.usable(kind)]

    @property
    def unable(self) -> list[Kind]:
        """The kinds of worker without which nothing can be answered, and that are not there."""
        return [kind for kind in self.missing if kind not in (Kind.PREFILL, Kind.ENCODE)]

    @property
    def adapters(self) -> list[str]:
        """The LoRA adapters that can be asked for: those that some worker of each kind has."""
        there = [kind for kind in self._needed if kind is not Kind.ENCODE and self.usable(kind)]
        found = [{name for link in self.usable(kind) for name in link.card.adapters} for kind in there]
        return sorted(set.intersection(*found)) if found else []

    @property
    def pooling(self) -> bool:
        """Whether the deployment's model answers with vectors or scores, not with text."""
        return Kind.EMBEDDING in self._needed


def _targets(link: Link, rank: int) -> list[Target]:
    first, count = link.card.dp_first, link.card.dp_count
    if rank >= 0:
        return [Target(link, rank)] if first <= rank < first + count else []
    return [Target(link, number) for number in range(first, first + count)] if count > 1 else [Target(link)]


async def answer(pool: Pool, question: Question, relay: Relay) -> Answered:
    """Get one question answered; the relay passes the bytes of a stream on as they come.

    A worker that is lost costs another attempt on another worker, which goes on where the client's stream was cut.
    Cancelling this coroutine cancels the request at the workers. The relay may hold ids of an answer that was begun before.

    Raises:
        ApiError: The request was refused, or no attempt succeeded.
    """
    avoid: set[str] = set()
    unpulled = False  # whether a decode worker could not reach the prefill worker
    for attempt in range(pool.attempts):
        final = attempt == pool.attempts - 1
        # An engine may still be ending the last attempt under its own id.
        asked = replace(question, request_id=f"{question.request_id}-{attempt}") if attempt else question
        try:
            last = await _attempt(pool, asked, relay, avoid, unpulled and final)
        except LegLostError as error:
            if final:
                raise ApiError(error.failed.status, error.failed.message, retry_after_s=1) from error
            avoid.add(error.instance)
            unpulled = unpulled or error.failed.source_lost
            relay.begin_again(keep=relay.written or not (question.restarts or question.render.stream))
            if relay.ids:
                pool.on_resumed()
        else:
            return Answered(
                last.data,
                last.prompt_tokens,
                last.completion_tokens,
                last.cached_tokens,
                last.reasoning_tokens,
                last.extra,
            )
    raise AssertionError("the last attempt returns or raises")


async def call(
    pool: Pool,
    kind: Kind,
    request_id: str,
    route: str,
    body: bytes,
    adapter: str,
    wanted: Wishes,
    write: Callable[[bytes], None] = lambda data: None,
) -> wire.Called:
    """Have a request answered by a worker of that kind; a lost one costs another attempt.

    What the worker says before its last word goes to `write`; after that there is no further attempt.

    Raises:
        ApiError: The request was refused, or no attempt succeeded.
    """
    avoid: set[str] = set()
    nobody = Question(request_id=request_id, prompt=b"", render=wire.NOTHING, adapter=adapter, wishes=wanted)
    for attempt in range(pool.attempts):
        target = pool.pick(kind, nobody, avoid)
        pool.on_leg(kind)
        relay = Relay(write)
        try:
            return await _run(target, relay, lambda stream: wire.Call(stream, request_id, route, body), wire.Called)
        except LegLostError as error:
            if relay.written or attempt == pool.attempts - 1:
                raise ApiError(error.failed.status, error.failed.message, retry_after_s=1) from error
            avoid.add(error.instance)
    raise AssertionError("the last attempt returns or raises")


class LegLostError(Exception):
    """A worker could not serve a leg, but another might."""

    def __init__(self, failed: wire.Failed, instance: str) -> None:
        super().__init__(failed.message)
        self.failed = failed
        self.instance = instance


class Relay:
    """The sink of an answering leg: passes bytes on, keeps the ids (for a continuation elsewhere), and ends a future."""

    # Every token comes by here, and finds what it touches no longer in the caches: the less memory that is, the better.
    __slots__ = ("_write", "ids", "last", "on_begun", "written")

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.ids = bytearray()
        self.written = False
        self.last = _future()
        self.on_begun: Callable[[], None] | None = None
        self._write = write

    def feed(self, ids: bytes, data: bytes) -> None:
        """Called for every token: this is the relay's whole work."""
        self.ids += ids
        if self.on_begun is not None:
            self._begin()
        if data:
            self.written = True
            self._write(data)

    def end(self, last: wire.LastWord) -> None:
        """The last word on the stream."""
        if not self.last.done():
            self.last.set_result(last)

    def begin_again(self, keep: bool) -> None:
        """Be ready for another attempt, which goes on after the ids so far, or from nothing."""
        if not keep:
            self.ids.clear()
        self.last = _future()
        self.on_begun = None

    def _begin(self) -> None:
        on_begun, self.on_begun = self.on_begun, None
        if on_begun is not None:
            on_begun()


def _future() -> asyncio.Future[wire.LastWord]:
    return asyncio.get_running_loop().create_future()


class Releaser:
    """The sink of a cancelled prefill: a result that was already on its way frees its blocks."""

    def __init__(self, pool: Pool, question: Question) -> None:
        self._pool = pool
        self._question = question

    def feed(self, ids: bytes, data: bytes) -> None:
        """A prefill has no deltas."""

    def end(self, last: wire.LastWord) -> None:
        """The last word: a result, or that there is none."""
        if isinstance(last, wire.Prefilled):
            _release(self._pool, self._question, last.transfer)


async def _attempt(pool: Pool, question: Question, relay: Relay, avoid: set[str], unpulled: bool) -> wire.End:
    """One attempt. With `unpulled` the decode worker computes the prompt: this is the last, and pulls have failed."""
    if question.media and pool.usable(Kind.ENCODE):
        question = await _encoded(pool, question, avoid)
    if not pool.disaggregated:
        return await _whole(pool, Kind.AGGREGATED, question, relay, avoid)
    reason = pool.local_reason(question) or (Reason.CUT if unpulled else None)
    if reason is not None:
        pool.on_local(reason)
        return await _whole(pool, Kind.DECODE, question, relay, avoid | pool.crowded(question, reason))
    source, prefilled = await _prefill(pool, question, relay, avoid)
    try:
        cut = pool.pairs.targets(source.card.instance)
        target = pool.pick(Kind.DECODE, question, avoid, source.card.fingerprint, computes=False, cut=cut)
        if time.time() > prefilled.expires_at:
            raise LegLostError(wire.Failed(0, 503, "the prefill expired, or the nodes' clocks differ", True), "")
    except (ApiError, LegLostError):
        _release(pool, question, prefilled.transfer)
        raise
    pool.on_leg(Kind.DECODE)

    def build(stream: int) -> wire.Generate:
        passed = question.rendered(prefilled.prompt, prefilled.features)
        prefilled.features = b""  # megabytes, which nobody needs while the answer streams
        return _generate(stream, passed, relay, wire.Leg.DECODE, target.rank, prefilled)

    # Once sent, the transfer belongs to the decode worker, which uses it or releases it.
    try:
        last = await _run(
            target,
            relay,
            build,
            wire.End,
            source=source,
            on_unsent=lambda: _release(pool, question, prefilled.transfer),
        )
    except LegLostError as error:
        if error.failed.source_lost:  # its blocks stay until their lease ends: a pull that hangs may still read them
            pool.pairs.cut(source.card.instance, target.link.card.instance)
            avoid.add(source.card.instance)
        raise
    # The decode side's own count is unreliable after a pull (vLLM 0.32); the prefill side knows.
    last.cached_tokens = min(prefilled.cached_tokens, last.prompt_tokens)
    return last


async def _whole(pool: Pool, kind: Kind, question: Question, relay: Relay, avoid: set[str]) -> wire.End:
    """The only leg of a request: prompt and answer on one worker."""
    target = pool.pick(kind, question, avoid)
    pool.on_leg(kind)

    def build(stream: int) -> wire.Generate:
        return _generate(stream, question, relay, wire.Leg.WHOLE, target.rank)

    last = await _run(target, relay, build, wire.End, tokens=target.tokens(question))
    last.cached_tokens = min(last.cached_tokens, last.prompt_tokens)  # ids of an earlier attempt may be cached too
    if target.booking:
        target.booking.hit(last.cached_tokens, last.prompt_tokens)
    return last


async def _encoded(pool: Pool, question: Question, avoid: set[str]) -> Question:
    """The question after its encode leg; as it was when its worker was lost: whoever computes the prompt can encode too."""
    apart = replace(question, adapter="", dp_rank=-1)
    target = pool.pick(Kind.ENCODE, apart, avoid)
    pool.on_leg(Kind.ENCODE)
    relay = Relay(lambda data: None)

    def build(stream: int) -> wire.Generate:
        return _generate(stream, apart, relay, wire.Leg.ENCODE, -1)

    try:
        encoded = await _run(target, relay, build, wire.Prefilled, tokens=question.tokens)
    except LegLostError:
        return question
    return question.rendered(encoded.prompt, encoded.features)


async def _prefill(pool: Pool, question: Question, relay: Relay, avoid: set[str]) -> tuple[Link, wire.Prefilled]:
    """The prefill leg. When the client leaves during it, its result is released as soon as it is there."""
    target = pool.pick(Kind.PREFILL, question, avoid, cut=pool.unpulled(question))
    pool.on_leg(Kind.PREFILL)

    def build(stream: int) -> wire.Generate:
        return _generate(stream, question, relay, wire.Leg.PREFILL, target.rank)

    own = Relay(lambda data: None)
    unwanted = Releaser(pool, question)
    tokens = target.tokens(question)
    done = await _run(target, own, build, wire.Prefilled, tokens=tokens, unwanted=unwanted)
    if target.booking:
        target.booking.hit(done.cached_tokens, len(done.prompt) // 4 or question.tokens)
    return target.link, done


def _generate(
    stream: int,
    question: Question,
    relay: Relay,
    leg: wire.Leg,
    rank: int,
    prefilled: wire.Prefilled | None = None,
) -> wire.Generate:
    return wire.Generate(
        stream=stream,
        leg=leg,
        request_id=question.request_id,
        prompt=question.prompt,
        produced=bytes(relay.ids),
        options=question.options,
        max_tokens=question.max_tokens,
        render=question.render,
        transfer=prefilled.transfer if prefilled else b"",
        expires_at=prefilled.expires_at if prefilled else 0.0,
        priority=question.priority,
        adapter=question.adapter,
        dp_rank=rank,
        choice=question.choice,
        cached_tokens=prefilled.cached_tokens if prefilled else -1,
        trace=question.trace,
        source=question.source,
        features=question.features,
    )


async def _run(
    target: Target,
    relay: Relay,
    build: Callable[[int], wire.Generate | wire.Call],
    expected: type[L],
    tokens: int = 0,
    unwanted: Releaser | None = None,
    source: Link | None = None,
    on_unsent: Callable[[], None] = lambda: None,
) -> L:
    """Run one leg to its last word.

    Args:
        target: Who serves it.
        relay: Where it goes.
        build: Makes the message for a stream number.
        expected: The last word that is success.
        tokens: Prompt tokens that the worker computes first.
        unwanted: Takes the last word if nobody waits for it any more.
        source: The prefill worker whose KV cache is pulled: an engine waits for ever for one that hangs (vLLM 0.32).
        on_unsent: Called when the message could not be sent at all.

    Raises:
        LegLostError: The worker or the source was lost.
        ApiError: The worker refused the request.
    """
    link = target.link
    number = link.open(build, relay, target.rank, tokens)
    if number is None:
        on_unsent()
        raise LegLostError(LOST, link.card.instance)
    booking = target.booking
    if booking:
        booking.begin()

    def begun() -> None:
        link.begun(number)
        if booking:
            booking.prefilled()

    relay.on_begun = begun

    def source_lost() -> None:
        if relay.on_begun is not None:  # once it answers, it has pulled
            relay.end(SOURCE_LOST)

    try:
        with source.watched(source_lost) if source else contextlib.nullcontext():
            last = await relay.last
    finally:
        link.cancel(number, unwanted)  # does nothing when the stream has ended
        if booking:
            booking.end()
    if isinstance(last, expected):
        return last
    assert isinstance(last, wire.Failed)
    if last.retryable:
        raise LegLostError(last, source.card.instance if source and last is SOURCE_LOST else link.card.instance)
    raise ApiError(last.status, last.message, param=last.param)


def _release(pool: Pool, question: Question, transfer: bytes) -> None:
    """Free the blocks of a prefill that no decode will pull; any decode worker can say so to the prefill worker."""
    for link in pool.usable(Kind.DECODE)[:1]:
        link.release(f"{question.request_id}-release", transfer)
