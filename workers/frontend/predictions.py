"""Blocks that a worker will have because of what was sent to it, until its events say so, or instead of them.

Between the choice of a worker and the event that its blocks are there, a prompt is computed: the next turn of many agents
that share a beginning comes within that time. And where workers tell nothing, what was sent lately is all there is to go by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Predictions:
    """What is expected of each holder (`workers.frontend.block_index`), each block for a while from its last mention on."""

    def __init__(self, ttl_s: float) -> None:
        self.table: dict[int, int] = {}
        """From a block's name to the set of holders that are expected to have it."""
        self._ttl_s = ttl_s
        self._until: dict[int, dict[int, float]] = {}

    def expect(self, holder: int, names: Sequence[int], now: float, capacity: int = 0) -> None:
        """A prompt with these blocks was sent; of more than `capacity` (0: any number) the ones longest unmentioned go.

        Of one prompt its end goes first, as in an engine's cache.
        """
        bit, table, until = 1 << holder, self.table, self._until.setdefault(holder, {})
        ends = now + self._ttl_s
        for name in reversed(names):
            until.pop(name, None)  # so that it is the youngest again
            until[name] = ends
            table[name] = table.get(name, 0) | bit
        if capacity and len(until) > capacity:
            self.met(holder, [name for name, _ in zip(until, range(len(until) - capacity), strict=False)])

    def met(self, holder: int, names: Iterable[int]) -> None:
        """The worker itself told of these blocks: there is nothing left to guess."""
        until = self._until.get(holder)
        if not until:
            return
        for name in names:
            if until.pop(name, None) is not None:
                self._drop(holder, name)

    def expire(self, now: float) -> None:
        """Drop what was not mentioned for too long."""
        for holder, until in self._until.items():
            late = []
            for name, ends in until.items():
                if ends > now:
                    break
                late.append(name)
            for name in late:
                del until[name]
                self._drop(holder, name)

    def forget(self, holder: int) -> None:
        """A holder left, or has a new number."""
        for name in self._until.pop(holder, ()):
            self._drop(holder, name)

    def __len__(self) -> int:
        """Number of predictions."""
        return sum(map(len, self._until.values()))

    def _drop(self, holder: int, name: int) -> None:
        holders = self.table.get(name, 0) & ~(1 << holder)
        if holders:
            self.table[name] = holders
        else:
            self.table.pop(name, None)
