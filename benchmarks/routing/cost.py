"""What routing by KV cache costs: time and memory of the index, beside one of numpy arrays, and CPU of one choice.

    python -m benchmarks.routing.cost [--blocks 10000000]

CPU time, so that a busy machine matters less; the two indexes hold the same blocks and answer the same prompts. The array index
is open addressing in two arrays, looked up and filled a prompt at a time. The dictionaries are searched as the router does it
(`BlockIndex.overlap`) and walked block by block, as it did before; in turns, so that both meet the same machine. Beside prompts
that one worker has whole there are those of which every worker has another number of blocks, where a search looks at most.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.quality import Ask, Worker, _card
from workers.frontend.block_index import BlockIndex, _note
from workers.frontend.book import Book
from workers.frontend.kv_router import KvRouter, Weights
from workers.frontend.kv_view import KvView
from workers.runtime.blocks import chain, pack_names, root, unpack_names
from workers.runtime.kv_events import Changes

HOLDERS = 16
PROMPT_BLOCKS = 125
PAGE = 4096


class ArrayIndex:
    """The same promise as `BlockIndex`, less leaving and removing: names and sets of holders in two arrays."""

    def __init__(self, capacity: int) -> None:
        size = 1 << (int(capacity / 0.6) - 1).bit_length()
        self._names: NDArray[np.uint64] = np.zeros(size, np.uint64)
        self._holders: NDArray[np.uint64] = np.zeros(size, np.uint64)
        self._low = np.uint64(size - 1)

    def stored(self, holder: int, names: Sequence[int]) -> None:
        """The holder has these blocks."""
        bit = np.uint64(1 << holder)
        wanted = np.unique(np.array(names, np.uint64))
        at = wanted & self._low
        while len(wanted):
            there = self._names[at]
            mine = (there == wanted) | (there == 0)
            # Two names may want one free place: whoever is there after writing has it.
            self._names[at[mine]] = wanted[mine]
            got = self._names[at] == wanted
            self._holders[at[got]] |= bit
            wanted, at = wanted[~got], (at[~got] + np.uint64(1)) & self._low

    def overlap(self, names: Sequence[int]) -> dict[int, int]:
        """How many blocks from the first on each holder has."""
        wanted = np.array(names, np.uint64)
        at = wanted & self._low
        found = np.zeros(len(wanted), np.uint64)
        left = np.arange(len(wanted))
        while len(left):
            there = self._names[at]
            hit = there == wanted[left]
            found[left[hit]] = self._holders[at[hit]]
            on = ~hit & (there != 0)
            left, at = left[on], (at[on] + np.uint64(1)) & self._low
        together = np.bitwise_and.accumulate(found)
        return {
            holder: int(np.count_nonzero(together & np.uint64(1 << holder)))
            for holder in range(HOLDERS)
            if int(together[0]) >> holder & 1
        }


@dataclass(slots=True)
class Chains:
    """Prompts of distinct blocks; every one is cached by one of the holders, and its first fifth by all."""

    blocks: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for number in range(self.blocks // PROMPT_BLOCKS):
            yield number % HOLDERS, [self.rng.getrandbits(64) or 1 for _ in range(PROMPT_BLOCKS)]


def megabytes() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def fill(index: BlockIndex | ArrayIndex, blocks: int) -> tuple[float, float, list[list[int]]]:
    """Fill an index; returns its memory in MB, seconds of CPU for each block, and some of the prompts."""
    before, spent = megabytes(), 0.0
    kept: list[list[int]] = []
    for holder, names in Chains(blocks):
        if len(kept) < 2000 and holder == 0:
            kept.append(unpack_names(pack_names(names)))  # as a request's own: other objects of the same value
        begun = time.process_time()
        index.stored(holder, names)
        for other in range(HOLDERS):
            index.stored(other, names[:5])
        spent += time.process_time() - begun
    return megabytes() - before, spent / blocks, kept


def walk(index: BlockIndex, names: Sequence[int]) -> dict[int, int]:
    """What `BlockIndex.overlap` finds, block by block."""
    found: dict[int, int] = {}
    shards, low, left = index._shards, index._low, index._shown
    depth = 0
    for depth, name in enumerate(names):
        holders = shards[name & low].get(name, 0) & left
        if holders != left:
            if depth:
                _note(found, left & ~holders, depth)
            left = holders
            if not left:
                return found
    _note(found, left, depth + 1)
    return found


def look_up(overlap: Callable[[list[int]], dict[int, int]], prompts: list[list[int]]) -> float:
    """Blocks looked up in a second of CPU; every prompt is found whole."""
    begun = time.process_time()
    for names in prompts:
        assert max(overlap(names).values()) == PROMPT_BLOCKS
    return len(prompts) * PROMPT_BLOCKS / (time.process_time() - begun)


def in_turns(index: BlockIndex, prompts: list[list[int]]) -> tuple[float, float]:
    """Medians of the blocks looked up in a second, by the search and by the walk."""
    rounds = [(look_up(index.overlap, prompts), look_up(partial(walk, index), prompts)) for _ in range(5)]
    searched, walked = zip(*rounds, strict=True)
    return statistics.median(searched), statistics.median(walked)


def stairs(index: BlockIndex, count: int) -> list[list[int]]:
    """Prompts in an index of which every holder has another number of blocks."""
    rng = random.Random(1)
    prompts = []
    for _ in range(count):
        names = [rng.getrandbits(64) for _ in range(PROMPT_BLOCKS)]
        for holder in range(HOLDERS):
            index.stored(holder, names[: PROMPT_BLOCKS * (holder + 1) // HOLDERS])
        prompts.append(unpack_names(pack_names(names)))
    return prompts


def one_choice(tokens: int, block_size: int) -> dict[str, float]:
    """Microseconds of CPU for each part of a request's routing over `HOLDERS` workers, half of the prompt being cached."""
    rng = random.Random(0)
    workers = [Worker(f"w{number}") for number in range(HOLDERS)]
    view = KvView(lambda member, ask: None)
    view.follow([_card(worker.name) for worker in workers])
    router = KvRouter(view, Book(), Weights())
    prompts = [np.array([rng.randrange(30_000) for _ in range(tokens)], "<u4").tobytes() for _ in range(400)]
    for number, worker in enumerate(workers):
        for page in worker.ledger.picture():
            page.block_size = block_size
            view.handle(page)
        halves = [chain(p[: len(p) // 2], block_size, root()) for p in prompts[number::HOLDERS]]
        names = pack_names(name for half in halves for name in half)
        view.handle(Changes(worker.name, 0, 1, block_size, (), (names, b"", b""), (b"", b"", b"")))
    chained = _per(lambda prompt: chain(prompt, block_size, root()), prompts)
    picked = _per(lambda prompt: router.pick(workers, Ask(prompt, ""), True), prompts)

    def whole(prompt: bytes) -> None:
        _, booking = router.pick(workers, Ask(prompt, ""), True)
        booking.begin()
        booking.prefilled()
        booking.hit(0, tokens)
        booking.end()

    return {"names": chained, "names and choice": picked, "with the book and predictions": _per(whole, prompts)}


def _per(work: Callable[[bytes], object], prompts: list[bytes]) -> float:
    best = float("inf")
    for _ in range(5):
        begun = time.process_time()
        for prompt in prompts:
            work(prompt)
        best = min(best, (time.process_time() - begun) / len(prompts))
    return best * 1e6


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=10_000_000)
    asked = parser.parse_args()
    print("| CPU of one request, 16 workers | names | names and choice | with the book and predictions |")
    print("|---|---|---|---|")
    for tokens, size in ((2000, 16), (2000, 32), (2000, 128), (16000, 32)):
        parts = " | ".join(f"{value:.0f} µs" for value in one_choice(tokens, size).values())
        print(f"| {tokens} tokens, blocks of {size} | {parts} |")
    print("\n| index | blocks | memory MB | ns to store one | blocks looked up in a second | block by block | ratio |")
    print("|---|---|---|---|---|---|---|")
    arrays = ArrayIndex(asked.blocks // 10)
    memory, store_s, prompts = fill(arrays, asked.blocks // 10)
    speed = statistics.median(look_up(arrays.overlap, prompts) for _ in range(5))
    print(f"| two numpy arrays | {asked.blocks // 10:,} | {memory:.0f} | {store_s * 1e9:.0f} | {speed:,.0f} | | |")
    for blocks in (asked.blocks // 10, asked.blocks):
        index = BlockIndex()
        for _ in range(HOLDERS):
            index.join()
        memory, store_s, prompts = fill(index, blocks)
        for what, some in (("one worker has it", prompts), ("each has another part", stairs(index, 2000))):
            searched, walked = in_turns(index, some)
            print(
                f"| dictionaries, {what} | {blocks:,} | {memory:.0f} | {store_s * 1e9:.0f} "
                f"| {searched:,.0f} | {walked:,.0f} | {searched / walked:.1f} |",
                flush=True,
            )
    slowest = 0.0
    index.leave(3)
    begun = last = time.perf_counter()
    for _ in index.sweep():
        now = time.perf_counter()
        slowest, last = max(slowest, now - last), now
    print(f"\nA worker that left is swept in {last - begun:.1f} s, at most {slowest * 1e3:.1f} ms at a time.")


if __name__ == "__main__":
    main()
