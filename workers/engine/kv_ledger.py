"""What the caches of one data-parallel rank hold, and what of it was not yet told to the frontends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from workers.runtime.blocks import pack_names
from workers.runtime.kv_events import NO_BLOCKS, PAGE_BLOCKS, Changes, Page, Tier


class Ledger:
    """The blocks of one rank, by tier.

    An engine may hold a block more than once (two requests that computed it at the same time; several groups of layers);
    it is gone when the last of them is.
    """

    def __init__(self, instance: str, rank: int, block_size: int) -> None:
        self.block_size = block_size
        self.trouble = ""
        """Why this may be wrong, or empty."""
        self._instance = instance
        self._rank = rank
        self._held: tuple[dict[int, int], ...] = tuple({} for _ in Tier)
        self._changed: tuple[dict[int, bool], ...] = tuple({} for _ in Tier)
        self._cleared: set[int] = set()
        self._number = 0
        self._pictures = 0

    def stored(self, names: Iterable[int], tier: int = Tier.DEVICE) -> None:
        """These blocks are there, once more."""
        held, changed = self._held[tier], self._changed[tier]
        for name in names:
            count = held.get(name, 0)
            held[name] = count + 1
            if not count:
                changed[name] = True

    def removed(self, names: Iterable[int], tier: int = Tier.DEVICE) -> None:
        """These are there once less."""
        held, changed = self._held[tier], self._changed[tier]
        for name in names:
            count = held.get(name, 0)
            if count > 1:
                held[name] = count - 1
            elif count:
                del held[name]
                changed[name] = False

    def cleared(self, tier: int = Tier.DEVICE) -> None:
        """A tier lost everything."""
        self._held[tier].clear()
        self._changed[tier].clear()
        self._cleared.add(tier)

    def holds(self, name: int) -> bool:
        """Whether the block is in any tier."""
        return any(name in held for held in self._held)

    def blocks(self, tier: int = Tier.DEVICE) -> int:
        """Number of different blocks in a tier."""
        return len(self._held[tier])

    def take(self) -> Changes | None:
        """What has changed since the last time, numbered; None when nothing has."""
        if not self._cleared and not any(self._changed):
            return None
        self._number += 1
        changes = Changes(
            self._instance,
            self._rank,
            self._number,
            self.block_size,
            tuple(self._cleared),
            tuple(pack_names(name for name, there in changed.items() if there) for changed in self._changed),
            tuple(pack_names(name for name, there in changed.items() if not there) for changed in self._changed),
            trouble=self.trouble,
        )
        self._cleared = set()
        for changed in self._changed:
            changed.clear()
        return changes

    def beat(self) -> Changes:
        """The number of what was told last."""
        return Changes(self._instance, self._rank, self._number, self.block_size, beat=True, trouble=self.trouble)

    def picture(self) -> Iterator[Page]:
        """All blocks, as of now, page by page; what was not yet told is in it and will be told again."""
        self._pictures += 1
        held = [(tier, list(blocks)) for tier, blocks in enumerate(self._held)]
        parts = [
            (tier, names[start : start + PAGE_BLOCKS])
            for tier, names in held
            for start in range(0, len(names), PAGE_BLOCKS)
        ] or [(int(Tier.DEVICE), [])]
        number, picture = self._number, self._pictures
        for at, (tier, names) in enumerate(parts):
            stored = (*NO_BLOCKS[:tier], pack_names(names), *NO_BLOCKS[tier + 1 :])
            last = at == len(parts) - 1
            yield Page(self._instance, self._rank, number, picture, self.block_size, stored, last, self.trouble)
