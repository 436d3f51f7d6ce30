"""The prefix cache that an echo engine pretends to have: what vLLM's does, to those who route by it.

A prompt's blocks that are here need no computing, the others take their time, one prompt after the other; then they are here
too, and so are those of the answer. Blocks of running requests stay; of the others the ones unused for longest go, and of
one prompt its end before its beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, cast

import msgspec

from workers.engine.base import Ask, Piece
from workers.engine.echo import EchoEngine
from workers.engine.echo_operations import EchoOperations
from workers.engine.kv_ledger import Ledger
from workers.runtime.blocks import chain, root
from workers.runtime.wire import pack


class PrefixCache:
    """Which blocks are here; pure but for the ledger that is told."""

    def __init__(self, capacity: int) -> None:
        self.ledger: Ledger | None = None
        self.evicted = 0
        self._capacity = capacity
        self._free: dict[int, None] = {}
        self._used: dict[int, int] = {}

    def find(self, names: Sequence[int]) -> int:
        """How many of a prompt's blocks are here, from the first on."""
        for number, name in enumerate(names):
            if name not in self._free and name not in self._used:
                return number
        return len(names)

    def take(self, names: Sequence[int]) -> None:
        """A request uses these blocks; those that were not here are now."""
        fresh = []
        for name in names:
            count = self._used.get(name)
            if count is None and self._free.pop(name, 1) is not None:
                fresh.append(name)
            self._used[name] = (count or 0) + 1
        if self.ledger and fresh:
            self.ledger.stored(fresh)
        self._evict()

    def give(self, names: Sequence[int]) -> None:
        """A request uses them no more."""
        for name in reversed(names):
            if self._used[name] > 1:
                self._used[name] -= 1
            else:
                del self._used[name]
                self._free[name] = None

    def clear(self) -> None:
        """Forget what no request uses."""
        if self.ledger:
            self.ledger.removed(list(self._free))
        self._free.clear()

    def __len__(self) -> int:
        """Blocks that are here."""
        return len(self._free) + len(self._used)

    @property
    def usage(self) -> float:
        """Share of the blocks that running requests use."""
        return len(self._used) / self._capacity

    def _evict(self) -> None:
        gone = []
        while self._free and len(self) > self._capacity:
            name = next(iter(self._free))
            del self._free[name]
            gone.append(name)
        self.evicted += len(gone)
        if self.ledger and gone:
            self.ledger.removed(gone)


class EchoCache:
    """A prefix cache, and the time that prompts take."""

    def __init__(self, capacity: int, block_size: int, tokens_per_s: float) -> None:
        self.blocks = PrefixCache(capacity)
        self._block_size = block_size
        self._tokens_per_s = tokens_per_s
        self._computing = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def serving(self, ask: Ask, said: list[int]) -> AsyncIterator[int]:
        """Compute a prompt and hold its blocks; yields how many of its tokens were cached. `said` is the answer at the end."""
        prompt = ask.prompt + ask.produced
        parent = root(ask.adapter, _salt(ask.options))
        names = chain(pack(prompt), self._block_size, parent)
        async with self._computing if self._tokens_per_s else contextlib.nullcontext():
            cached = min(
                self.blocks.find(names) * self._block_size, (len(prompt) - 1) // self._block_size * self._block_size
            )
            if self._tokens_per_s and ask.transfer is None:
                await asyncio.sleep((len(prompt) - cached) / self._tokens_per_s)
        self.blocks.take(names)
        try:
            yield cached
        finally:
            # The last token of an answer is never computed.
            answered = chain(pack((prompt + said)[:-1]), self._block_size, parent)[len(names) :] if said else []
            self.blocks.take(answered)
            self.blocks.give([*names, *answered])


class CachingEcho(EchoEngine):
    """An echo engine with a prefix cache, one for each data-parallel rank."""

    def __init__(self, tokenizer: Any, interval_s: float, blocks: int, tokens_per_s: float, slots: int = 0) -> None:
        super().__init__(tokenizer, interval_s, slots)
        self._blocks, self._tokens_per_s = blocks, tokens_per_s
        self.caches = {0: self._empty()}
        self.sizes = dataclasses.replace(self.sizes, kv_blocks=blocks)
        self.operable = CachingOperations(self.adapters, self.caches)

    def tell(self, ledgers: Mapping[int, Ledger]) -> None:
        """Have the caches say what they hold."""
        self.caches.clear()
        for rank, ledger in ledgers.items():
            self.caches[rank] = self._empty()
            self.caches[rank].blocks.ledger = ledger

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Serve one leg; see `base.Engine`."""
        cache = self.caches.get(ask.dp_rank) or self.caches[min(self.caches)]
        said: list[int] = []
        answer = cast(AsyncGenerator[Piece, None], super().generate(ask))
        async with cache.serving(ask, said) as cached, contextlib.aclosing(answer) as pieces:
            self._note_usage()
            async for piece in pieces:
                said += piece.ids
                if piece.finish:
                    piece.cached_tokens = cached
                yield piece
        self._note_usage()

    def _empty(self) -> EchoCache:
        return EchoCache(self._blocks, self.sizes.block_size, self._tokens_per_s)

    def _note_usage(self) -> None:
        self.load.kv_usage = max(cache.blocks.usage for cache in self.caches.values())


class CachingOperations(EchoOperations):
    """Operations of an echo engine with a prefix cache."""

    def __init__(self, adapters: dict[str, Any], caches: Mapping[int, EchoCache]) -> None:
        super().__init__(adapters)
        self._caches = caches

    async def clear_cache(self) -> bool:
        """See `base.Operable`."""
        if any(cache.blocks.usage for cache in self._caches.values()):
            return False
        for cache in self._caches.values():
            cache.blocks.clear()
        return await super().clear_cache()


def _salt(options: bytes) -> str:
    if b"cache_salt" not in options:
        return ""
    salt = msgspec.json.decode(options).get("cache_salt")
    return salt if isinstance(salt, str) else ""
