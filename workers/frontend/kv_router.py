"""Choose a worker by what it caches and what it has to do, in KV blocks.

    cost(w) = blocks of prompts sent to w that it has yet to compute             (the queue before this one)
            + load_weight * blocks of the prompts under way at w                 (memory, and steps that take longer)
            + balance_weight * blocks that w was given lately beyond the mean of all  (`workers.frontend.shares`)
            - overlap_weight * (device + HOST_WEIGHT * host + DISK_WEIGHT * disk) blocks of this prompt that w caches

The cheapest is taken, of equals the one that was given least lately; with a temperature, costs are spread over 0 to 1 and drawn from a softmax. A worker
that only pulls the prompt from another saves a transfer by what it caches, which counts `PULL_WEIGHT`. That the defaults
are not one to one is measured (docs/routing.md): a block that is computed elsewhere is computed twice and cached twice, so
that others go sooner; a block that is held by a running request costs the next one little.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from workers.frontend.book import Book, Booking, Key
from workers.frontend.kv_view import NONE, KvView, Overlap
from workers.frontend.shares import Shares
from workers.frontend.wishes import Wishes

HOST_WEIGHT = 0.75
DISK_WEIGHT = 0.25
PULL_WEIGHT = 0.1


class Ask(Protocol):
    """What is looked at of a request."""

    @property
    def prompt(self) -> bytes:
        """Packed token ids; empty where a worker makes them."""
        ...

    @property
    def adapter(self) -> str:
        """The LoRA adapter, or empty."""
        ...

    @property
    def tokens(self) -> int:
        """Length of the prompt, as far as is known."""
        ...

    @property
    def wishes(self) -> Wishes:
        """What the client said of who should answer."""
        ...


class KvCandidate(Protocol):
    """What is looked at of a worker."""

    @property
    def key(self) -> Key:
        """Its instance and rank."""
        ...

    @property
    def member(self) -> str:
        """Its name in the plan."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How caches count against load; see the module. An overlap weight of 0 is load alone."""

    overlap: float = 2.0
    load: float = 0.4
    balance: float = 0.1
    temperature: float = 0.0


@dataclass(slots=True)
class Hits:
    """Prompt tokens that were expected to be cached where they were sent, and that were; requests and the prompt tokens that
    they left to compute, by member and rank.
    """

    predicted_tokens: int = 0
    actual_tokens: int = 0
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    computed_tokens: Counter[tuple[str, int]] = field(default_factory=Counter)


class KvBooking(Booking):
    """A leg that was chosen by what workers cache; once it is sent, its prompt is expected to be cached there."""

    __slots__ = ("_length", "_member", "_names", "_router", "_sketched", "_where", "cached_tokens")

    def __init__(
        self,
        router: KvRouter,
        chosen: KvCandidate,
        blocks: int,
        computes: bool,
        length: int,
        names: Sequence[int],
        cached: int,
        sketched: bool,
    ) -> None:
        key = chosen.key
        super().__init__(router.book, key, blocks, length - cached if computes else 0)
        self._member = chosen.member
        self._length = length
        self._router = router
        self._where = key
        self._names = names
        self._sketched = sketched
        self.cached_tokens = cached
        """Prompt tokens that the worker is expected to have."""

    def begin(self) -> None:
        """The leg was sent."""
        super().begin()
        self._router.shares.note(self._where, self.tokens)
        self._router.view.expect(self._where, self._names, self._sketched)
        self._router.on_routed(self._where, self._names, self._sketched)

    def hit(self, tokens: int, length: int) -> None:
        """So many tokens of the prompt were cached; `length` is how many it has, of which there may have been a guess only."""
        hits, guessed = self._router.hits, max(self._length, 1)
        expected = self.cached_tokens * length // guessed
        if self._sketched and 2 * tokens < expected:  # no events tell of it: it is no longer there
            self._router.view.unexpect(self._where, self._names)
        hits.predicted_tokens += expected
        hits.actual_tokens += tokens
        where = (self._member, self._where[1])
        hits.requests[where] += 1
        hits.computed_tokens[where] += length - tokens


class KvRouter:
    """The mode `kv`."""

    def __init__(
        self,
        view: KvView,
        book: Book,
        weights: Weights,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.view = view
        self.book = book
        self.shares = Shares(clock)
        self.hits = Hits()
        self.on_routed: Callable[[Key, Sequence[int], bool], None] = lambda key, names, sketched: None
        """Told of each prompt that is sent, with the blocks that are new there, and whether they are those of a sketch."""
        self._weights = weights
        self._rng = rng or random.Random()

    def pick(
        self, candidates: Sequence[KvCandidate], ask: Ask, computes: bool, only: int | None = None
    ) -> tuple[int, KvBooking]:
        """The index of the worker, and the leg for the book; with `only` it is that one.

        `computes` says whether the prompt is computed there.
        """
        keys = [item.key for item in candidates]
        sizes = [self.view.block_size(key) for key in keys]
        overlaps = self._overlaps(set(sizes), ask)
        index = only
        if index is None:
            weight = self._weights.overlap * (1.0 if computes else PULL_WEIGHT)
            given = self.shares.of(keys)
            mean, balance = sum(given) / len(given), self._weights.balance
            costs = []
            for key, size, tokens in zip(keys, sizes, given, strict=True):
                cost = self._cost(key, size, overlaps.get(key, NONE), weight)
                costs.append(cost + balance * (tokens - mean) / (size or 1) if tokens > mean else cost)
            index = choose(costs, given, self._weights.temperature, self._rng)
        key, size = keys[index], sizes[index] or 1
        tokens, sketched = ask.tokens, bool(ask.wishes.sketch)
        names = ask.wishes.names(ask.prompt, ask.adapter, size)
        found = overlaps.get(key, NONE)
        # The last token is computed in any case: a prompt that is cached whole is not all hit.
        cached = min(found.blocks * size, max(tokens - 1, 0) // size * size)
        new = names[found.device :] if self.view.events and not sketched else names
        return index, KvBooking(self, candidates[index], -(-tokens // size), computes, tokens, new, cached, sketched)

    def cached_tokens(self, candidates: Sequence[KvCandidate], ask: Ask) -> int:
        """The most tokens of the prompt that one of these has."""
        keys = [item.key for item in candidates]
        found = self._overlaps({self.view.block_size(key) for key in keys}, ask)
        return max((found[key].blocks * self.view.block_size(key) for key in keys if key in found), default=0)

    def _overlaps(self, sizes: set[int], ask: Ask) -> dict[Key, Overlap]:
        """What every worker with blocks of one of these sizes has of a prompt; 0 stands for those that are unknown."""
        found: dict[Key, Overlap] = {}
        for size in sizes - {0}:  # blocks of one size are nobody's of another: their names differ
            found |= self.view.overlaps(ask.wishes.names(ask.prompt, ask.adapter, size), bool(ask.wishes.sketch))
        return found

    def _cost(self, key: Key, size: int, overlap: Overlap, weight: float) -> float:
        blocks, tokens = self.book.pressure(key)
        cost = tokens / (size or 1) + self._weights.load * blocks - weight * overlap.device
        if overlap.host or overlap.disk:
            cost -= weight * (HOST_WEIGHT * overlap.host + DISK_WEIGHT * overlap.disk)
        return cost


def choose(costs: Sequence[float], given: Sequence[float], temperature: float, rng: random.Random) -> int:
    """The index of a cost: the lowest, of equals the one with the least in `given`, of those one by chance.

    Where there is a temperature, by softmax over the costs.
    """
    lowest, highest = min(costs), max(costs)
    if temperature <= 0 or lowest == highest:
        equal = [index for index, cost in enumerate(costs) if cost == lowest]
        if len(equal) > 1:
            least = min(given[index] for index in equal)
            equal = [index for index in equal if given[index] == least]
        return equal[0] if len(equal) == 1 else rng.choice(equal)
    weights = [math.exp(-(cost - lowest) / (highest - lowest) / temperature) for cost in costs]
    return rng.choices(range(len(costs)), weights)[0]
