"""Routing quality in simulated time: the router's real code over simulated workers, against one that knows every cache.

    python -m benchmarks.routing.quality [--seeds 3]

Eight workers with prefix caches of `BLOCKS` blocks compute one prompt after the other and answer any number of requests at
once; what they cache is told `LAG_S` after it is so. Of each policy: the share of prompt tokens found in cache, that share
as a part of the oracle's, the load of the busiest worker over the mean (tokens computed and answered; requests), and the
time to the first token. The oracle looks into every cache, blocks that are being computed included, and takes the worker
with the longest prefix, of equals the one with the least to do; it minds no load otherwise, and is balanced by nobody.
`no eviction` is what one cache without bounds would find: no routing can find more.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.routing.trace import Turn, conversations, echoed
from launch.recipe import Kind, RouterMode
from workers.engine.echo_cache import PrefixCache
from workers.engine.kv_ledger import Ledger
from workers.frontend.book import Book, Key
from workers.frontend.kv_router import KvBooking, KvRouter, Weights
from workers.frontend.kv_view import KvView
from workers.frontend.router import mode, session_choice
from workers.frontend.wishes import Wishes
from workers.runtime.blocks import chain, root
from workers.runtime.registry import Card
from workers.runtime.wire import pack

WORKERS = 8
BLOCK = 32
BLOCKS = 1500
TOKENS_PER_S = 8000.0
TOKEN_S = 0.012
LAG_S = 0.03


@dataclass(slots=True)
class Worker:
    """One simulated engine."""

    name: str
    cache: PrefixCache = field(default_factory=lambda: PrefixCache(BLOCKS))
    ledger: Ledger = field(init=False)
    free_at: float = 0.0
    in_flight: int = 0
    waiting: int = 0
    requests: int = 0
    tokens: int = 0
    coming: dict[int, int] = field(default_factory=dict)
    """Blocks of prompts that were sent and are not computed yet."""

    def __post_init__(self) -> None:
        self.ledger = self.cache.ledger = Ledger(self.name, 0, BLOCK)

    @property
    def member(self) -> str:
        """As the plan would name it."""
        return self.name

    @property
    def key(self) -> Key:
        """As the router names it."""
        return self.name, 0

    def depth(self, names: Sequence[int]) -> int:
        """How many blocks of a prompt it has, or will have."""
        for number, name in enumerate(names):
            if self.cache.find((name,)) == 0 and name not in self.coming:
                return number
        return len(names)


@dataclass(slots=True)
class Ask:
    """A request, as the router sees it."""

    prompt: bytes
    session: str
    adapter: str = ""
    wishes: Wishes = field(default_factory=Wishes)

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt) // 4


Policy = Callable[[list[Worker], Ask, float], tuple[int, KvBooking | None]]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one run."""

    found: float
    work: float
    requests: float
    ttft_ms: float
    ttft_p99_ms: float


class Simulation:
    """One trace through one policy."""

    def __init__(self, policy: Policy, view: KvView | None) -> None:
        self.workers = [Worker(f"w{number}") for number in range(WORKERS)]
        self._policy = policy
        self._view = view
        if view:
            view.follow([_card(worker.name) for worker in self.workers])
            for worker in self.workers:
                self._tell(worker, picture=True)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._cached = self._asked = 0
        self._waits: list[float] = []

    def run(self, talks: list[list[Turn]]) -> Result:
        """Play the trace to its end."""
        for turns in talks:
            if turns:
                self._at(turns[0].start_s, lambda now, turns=turns: self._turn(turns, 0, now))  # type: ignore[misc]
        while self._events:
            now, _, action = heapq.heappop(self._events)
            action(now)
        work = [worker.tokens for worker in self.workers]
        count = [worker.requests for worker in self.workers]
        waits = sorted(self._waits)
        return Result(
            self._cached / self._asked,
            max(work) / statistics.mean(work),
            max(count) / statistics.mean(count),
            1000 * statistics.median(waits),
            1000 * waits[int(len(waits) * 0.99)],
        )

    def _at(self, when: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), action))

    def _turn(self, turns: list[Turn], number: int, now: float) -> None:
        turn = turns[number]
        prompt = pack(turn.prompt)
        ask = Ask(prompt, str(turn.conversation))
        index, booking = self._policy(self.workers, ask, now)
        worker = self.workers[index]
        names = chain(prompt, BLOCK, root())
        worker.in_flight += 1
        worker.requests += 1
        for name in names:
            worker.coming[name] = worker.coming.get(name, 0) + 1
        if booking:
            booking.begin()

        def compute(then: float) -> None:
            have = min(worker.cache.find(names) * BLOCK, (len(turn.prompt) - 1) // BLOCK * BLOCK)
            self._cached += have
            self._asked += len(turn.prompt)
            worker.tokens += len(turn.prompt) - have + turn.answer
            done = then + (len(turn.prompt) - have) / TOKENS_PER_S
            worker.free_at = done
            self._at(done, computed)

        def computed(then: float) -> None:
            worker.cache.take(names)
            for name in names:
                worker.coming[name] -= 1
                if not worker.coming[name]:
                    del worker.coming[name]
            self._waits.append(then - now)
            if booking:
                booking.prefilled()
            self._soon(worker, then)
            self._at(then + turn.answer * TOKEN_S, answered)

        def answered(then: float) -> None:
            whole = pack((*turn.prompt, *echoed(turn.prompt, turn.answer))[:-1])
            rest = chain(whole, BLOCK, root())[len(names) :]
            worker.cache.take(rest)
            worker.cache.give([*names, *rest])
            worker.in_flight -= 1
            if booking:
                booking.end()
            self._soon(worker, then)
            if number + 1 < len(turns):
                self._at(then + turns[number + 1].think_s, lambda later: self._turn(turns, number + 1, later))

        begins = max(now, worker.free_at)
        worker.free_at = begins + 1e-9
        self._queue(worker, begins, compute)

    def _queue(self, worker: Worker, when: float, compute: Callable[[float], None]) -> None:
        """One prompt after the other: who finds the engine busy comes again when it is free."""

        def begin(now: float) -> None:
            if worker.free_at > now + 1e-6:
                self._at(worker.free_at, begin)
            else:
                compute(now)

        self._at(when, begin)

    def _soon(self, worker: Worker, now: float) -> None:
        if self._view:
            self._at(now + LAG_S, lambda then: self._tell(worker))

    def _tell(self, worker: Worker, picture: bool = False) -> None:
        assert self._view
        if picture:
            for page in worker.ledger.picture():
                self._view.handle(page)
        elif changes := worker.ledger.take():
            self._view.handle(changes)


def _card(name: str) -> Card:
    return Card(
        member=name,
        instance=name,
        kind=Kind.AGGREGATED,
        address="",
        metrics="",
        model="",
        max_model_len=4096,
        block_size=BLOCK,
        version="",
        kv_blocks=BLOCKS,
    )


def oracle(workers: list[Worker], ask: Ask, now: float) -> tuple[int, None]:
    """The longest prefix, of equals the least to do."""
    names = chain(ask.prompt, BLOCK, root())
    ranked = [
        (-worker.depth(names), max(0.0, worker.free_at - now), worker.in_flight, index)
        for index, worker in enumerate(workers)
    ]
    return min(ranked)[3], None


def no_eviction(talks: list[list[Turn]], answers: bool = True) -> float:
    """The share of prompt tokens that one cache without bounds would find; without `answers` it keeps prompts only."""
    seen: set[int] = set()
    found = asked = 0
    for turn in sorted((turn for turns in talks for turn in turns), key=lambda turn: (turn.start_s, turn.number)):
        names = chain(pack(turn.prompt), BLOCK, root())
        depth = next((number for number, name in enumerate(names) if name not in seen), len(names))
        found += min(depth * BLOCK, (len(turn.prompt) - 1) // BLOCK * BLOCK)
        asked += len(turn.prompt)
        whole = (*turn.prompt, *echoed(turn.prompt, turn.answer))[:-1] if answers else turn.prompt
        seen.update(chain(pack(whole), BLOCK, root()))
    return found / asked


def kv(events: bool, seed: int, weights: Weights) -> tuple[Policy, KvView]:
    """The router's mode kv, real but for the clock."""
    view = KvView(lambda member, ask: None, events, 120.0 if not events else 30.0)
    clock = Clock()
    router = KvRouter(view, Book(), weights, random.Random(seed), clock)

    def policy(workers: list[Worker], ask: Ask, now: float) -> tuple[int, KvBooking]:
        clock.now = now
        return router.pick(workers, ask, True)

    return policy, view


@dataclass(slots=True)
class Clock:
    """Simulated time, in seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def simple(name: RouterMode, seed: int) -> tuple[Policy, None]:
    """A mode without a view of caches."""
    choose = mode(name, random.Random(seed))
    return (lambda workers, ask, now: (choose(workers), None)), None


def sessions(workers: list[Worker], ask: Ask, now: float) -> tuple[int, None]:
    """Session affinity by conversation."""
    return session_choice(ask.session, [w.name for w in workers], [w.in_flight for w in workers]), None


def policies(seed: int) -> dict[str, tuple[Policy, KvView | None]]:
    """All that are compared."""
    return {
        "oracle": (oracle, None),
        "kv": kv(True, seed, Weights()),
        "kv, temperature 0.2": kv(True, seed, Weights(temperature=0.2)),
        "kv, weights 1 and 1": kv(True, seed, Weights(overlap=1.0, load=1.0)),
        "kv, overlap weight 0": kv(True, seed, Weights(overlap=0.0)),
        "kv without events": kv(False, seed, Weights()),
        "sessions": (sessions, None),
        "least_loaded": simple(RouterMode.LEAST_LOADED, seed),
        "power_of_two": simple(RouterMode.POWER_OF_TWO, seed),
        "round_robin": simple(RouterMode.ROUND_ROBIN, seed),
        "random": simple(RouterMode.RANDOM, seed),
    }


def main() -> None:
    """Print the table: medians over the seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=4.0, help="conversations that begin in a second")
    asked = parser.parse_args()
    results: dict[str, list[Result]] = {}
    bound = []
    for seed in range(asked.seeds):
        talks = conversations(seed, asked.rate)
        bound.append(no_eviction(talks))
        print(f"seed {seed}: {sum(map(len, talks))} requests, {len(talks)} conversations")
        for name, (policy, view) in policies(seed).items():
            results.setdefault(name, []).append(Simulation(policy, view).run(talks))
    best = statistics.median(result.found for result in results["oracle"])
    print("| policy | found in cache | of the oracle's | busiest / mean: work | requests | TTFT p50 ms | p99 |")
    print("|---|---|---|---|---|---|---|")
    print(f"| no eviction | {statistics.median(bound):.3f} | {statistics.median(bound) / best:.3f} | | | | |")
    for name, runs in results.items():
        m = {key: statistics.median(getattr(run, key) for run in runs) for key in Result.__slots__}
        print(
            f"| {name} | {m['found']:.3f} | {m['found'] / best:.3f} | {m['work']:.2f} | {m['requests']:.2f} "
            f"| {m['ttft_ms']:.0f} | {m['ttft_p99_ms']:.0f} |"
        )


if __name__ == "__main__":
    main()
