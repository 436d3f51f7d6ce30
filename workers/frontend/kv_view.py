"""A frontend's picture of what all workers cache, kept whole over gaps, restarts and losses.

For each data-parallel rank of each worker: numbered changes are applied in turn; a number that is missing, or a worker that is
new, is answered by asking for the whole picture, which is filled in beside the old one and takes its place. While NATS is
away the old picture stays in use, for what a worker caches it goes on caching.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from workers.frontend.block_index import BlockIndex
from workers.frontend.book import Key
from workers.frontend.predictions import Predictions
from workers.runtime.blocks import unpack_names
from workers.runtime.kv_events import Ask, Changes, Page, Tier
from workers.runtime.registry import Card

log = logging.getLogger(__name__)

ASK_AGAIN_S = 1.0
SILENT_S = 5.0
# Longer than a prompt waits and is computed; events make it superfluous before.
PREDICTED_S = 30.0
SKETCHED_S = 120.0
WAITING_CHANGES = 10_000
Holders = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many blocks of a prompt, from the first on, a rank has on its device, then in the host's memory, then on disk."""

    device: int = 0
    host: int = 0
    disk: int = 0

    @property
    def blocks(self) -> int:
        """All of them."""
        return self.device + self.host + self.disk


NONE = Overlap()


@dataclass(slots=True)
class Counts:
    """What happened, for the metrics."""

    changes: int = 0
    blocks: int = 0
    gaps: int = 0
    pictures: int = 0


@dataclass(slots=True)
class _Rank:
    """What is known of one rank; `filling` holds the blocks of a picture that is not whole yet."""

    member: str
    holders: Holders
    block_size: int
    capacity: int
    number: int = -1
    heard: float = 0.0
    trouble: str = ""
    whole: bool = False
    asked: float = 0.0
    asking: bool = False
    picture: int = -1
    filling: Holders | None = None
    waiting: list[Changes] = field(default_factory=list)


class KvView:
    """What the workers cache, by instance and rank."""

    def __init__(
        self,
        ask: Callable[[str, Ask], None],
        events: bool = True,
        ttl_s: float = PREDICTED_S,
        sketch_ttl_s: float = SKETCHED_S,
    ) -> None:
        """Make an empty view.

        Args:
            ask: Sends a request for a picture to a member.
            events: Whether workers tell what they cache; else it is predicted from what was sent to them.
            ttl_s: How long a prediction holds.
            sketch_ttl_s: How long it is taken that a prompt that a worker has made stays cached there.
        """
        self.events = events
        self.indexes = tuple(BlockIndex() for _ in Tier)
        self.predictions = Predictions(ttl_s)
        self.sketches = Predictions(sketch_ttl_s)
        """Of prompts that workers make: the names of their blocks are not known here, so that no event confirms them."""
        self.counts = Counts()
        self._ask = ask
        self._ranks: dict[Key, _Rank] = {}
        self._keys: dict[int, Key] = {}
        self._deaf = False

    def follow(self, cards: Iterable[Card]) -> None:
        """These are the workers that there are: ask the new ones what they cache, forget those that left."""
        wanted = {
            (card.instance, rank): card
            for card in cards
            for rank in range(card.dp_first, card.dp_first + card.dp_count)
        }
        for key in [key for key in self._ranks if key not in wanted]:
            rank = self._ranks.pop(key)
            for holders in (rank.holders, rank.filling):
                self._leave(holders)
        for key, card in wanted.items():
            if key not in self._ranks:
                holders = self._join()
                self._keys[holders[0]] = key
                rank = self._ranks[key] = _Rank(card.member, holders, card.block_size, card.kv_blocks)
                rank.heard = time.monotonic()
                if self.events:
                    self._request(key, rank)

    def handle(self, message: Changes | Page) -> None:
        """What a worker told; of an unknown one nothing is kept, it is asked once it is known."""
        key = (message.instance, message.rank)
        rank = self._ranks.get(key)
        if rank is None or not self.events:
            return
        rank.heard = time.monotonic()
        rank.trouble = message.trouble
        if isinstance(message, Page):
            self._page(key, rank, message)
        elif rank.asking:
            if not message.beat:
                rank.waiting.append(message)
                del rank.waiting[:-WAITING_CHANGES]
        else:
            self._change(key, rank, message)

    def tick(self) -> None:
        """Ask again where no answer came; drop old predictions. To be called a few times a second."""
        now = time.monotonic()
        self.predictions.expire(now)
        self.sketches.expire(now)
        if self.events:
            for key, rank in self._ranks.items():
                if rank.asking and now - rank.asked > ASK_AGAIN_S:
                    self._request(key, rank)

    def hears(self, connected: bool) -> None:
        """Whether NATS is there: while it is not, nobody is blamed for being silent."""
        if connected and self._deaf:
            for rank in self._ranks.values():
                rank.heard = time.monotonic()
        self._deaf = not connected

    def overlaps(self, names: Sequence[int], sketched: bool = False) -> dict[Key, Overlap]:
        """What of a prompt each rank has, or will have; ranks that have nothing are left out."""
        expected = self.sketches if sketched else self.predictions
        device = self.indexes[Tier.DEVICE].overlap(names, expected.table)
        keys = self._keys
        found = {keys[holder]: Overlap(depth) for holder, depth in device.items() if holder in keys}
        if not sketched and not (self.indexes[Tier.HOST].blank and self.indexes[Tier.DISK].blank):
            for key, rank in self._ranks.items():
                near = found.get(key, NONE).device
                host = self.indexes[Tier.HOST].run(rank.holders[Tier.HOST], names, near)
                disk = self.indexes[Tier.DISK].run(rank.holders[Tier.DISK], names, near + host)
                if host or disk:
                    found[key] = Overlap(near, host, disk)
        return found

    def block_size(self, key: Key) -> int:
        """Tokens of a rank's blocks; 0 for one that is unknown."""
        rank = self._ranks.get(key)
        return rank.block_size if rank else 0

    def unexpect(self, key: Key, names: Sequence[int]) -> None:
        """A prompt with this sketch was not cached there."""
        rank = self._ranks.get(key)
        if rank is not None:
            self.sketches.met(rank.holders[0], names)

    def expect(self, key: Key, names: Sequence[int], sketched: bool = False) -> None:
        """A prompt with these blocks goes there."""
        rank = self._ranks.get(key)
        if rank is None:
            return
        if sketched:
            self.sketches.expect(rank.holders[0], names, time.monotonic(), rank.capacity)
        else:
            self.predictions.expect(rank.holders[0], names, time.monotonic(), 0 if self.events else rank.capacity)

    @property
    def troubles(self) -> list[str]:
        """Which workers should tell what they cache and do not, and why."""
        if not self.events:
            return []
        now = time.monotonic()
        found = []
        for (_, number), rank in sorted(self._ranks.items(), key=lambda item: item[1].member):
            if rank.trouble:
                found.append(f"{rank.member} rank {number}: {rank.trouble}")
            elif not rank.whole:
                found.append(f"{rank.member} rank {number} has not told which KV blocks it caches")
            elif now - rank.heard > SILENT_S and not self._deaf:
                found.append(f"{rank.member} rank {number} tells no more which KV blocks it caches")
        return found

    def held(self) -> dict[str, int]:
        """Number of different blocks of all ranks, by tier."""
        return {tier.name.lower(): len(self.indexes[tier]) for tier in Tier}

    def _change(self, key: Key, rank: _Rank, changes: Changes) -> None:
        if changes.beat:
            missed = changes.number != rank.number
        else:
            missed = changes.number != rank.number + 1
            if changes.number <= rank.number:
                return
        if missed:
            self.counts.gaps += 1
            log.info(
                "%s rank %d told change %d after %d: asking it for all",
                rank.member,
                key[1],
                changes.number,
                rank.number,
            )
            self._request(key, rank)
            if not changes.beat:
                rank.waiting.append(changes)
        elif not changes.beat:
            self._apply(key, rank, changes)

    def _apply(self, key: Key, rank: _Rank, changes: Changes) -> None:
        rank.number = changes.number
        rank.block_size = changes.block_size
        self.counts.changes += 1
        if changes.cleared:
            self._clear(key, rank, changes.cleared)
        for tier, index in enumerate(self.indexes):
            holder = rank.holders[tier]
            for packed, note in ((changes.removed[tier], index.removed), (changes.stored[tier], index.stored)):
                if packed:
                    names = unpack_names(packed)
                    self.counts.blocks += len(names)
                    note(holder, names)
                    if tier == Tier.DEVICE:
                        self.predictions.met(holder, names)

    def _clear(self, key: Key, rank: _Rank, tiers: Sequence[int]) -> None:
        """A cleared tier begins anew under another number: taking out its blocks one by one would take long."""
        holders = list(rank.holders)
        for tier in tiers:
            index = self.indexes[tier]
            index.leave(holders[tier])
            fresh = index.join()
            if tier == Tier.DEVICE:
                self.predictions.forget(holders[tier])
                self.sketches.forget(holders[tier])
                del self._keys[holders[tier]]
                self._keys[fresh] = key
            holders[tier] = fresh
        rank.holders = tuple(holders)

    def _page(self, key: Key, rank: _Rank, page: Page) -> None:
        if not rank.asking:
            return
        if page.picture != rank.picture or rank.filling is None:
            self._leave(rank.filling)
            rank.picture, rank.filling = page.picture, self._join(shown=False)
        rank.asked = time.monotonic()
        for tier, packed in enumerate(page.stored):
            if packed:
                self.indexes[tier].stored(rank.filling[tier], unpack_names(packed))
        if page.last:
            self._turn(key, rank, page)

    def _turn(self, key: Key, rank: _Rank, page: Page) -> None:
        """The picture is whole: it takes the old one's place, and what was told meanwhile is applied."""
        assert rank.filling is not None
        old, rank.holders, rank.filling = rank.holders, rank.filling, None
        for index, holder in zip(self.indexes, rank.holders, strict=True):
            index.show(holder)
        self._leave(old)
        self._keys[rank.holders[0]] = key
        rank.number, rank.block_size = page.number, page.block_size
        rank.whole, rank.asking = True, False
        self.counts.pictures += 1
        waiting, rank.waiting = rank.waiting, []
        for changes in waiting:
            if rank.asking:
                rank.waiting.append(changes)
            else:
                self._change(key, rank, changes)

    def _request(self, key: Key, rank: _Rank) -> None:
        rank.asking, rank.asked = True, time.monotonic()
        self._ask(rank.member, Ask(*key))

    def _join(self, shown: bool = True) -> Holders:
        return tuple(index.join(shown) for index in self.indexes)

    def _leave(self, holders: Holders | None) -> None:
        if holders is None:
            return
        for index, holder in zip(self.indexes, holders, strict=True):
            index.leave(holder)
        self.predictions.forget(holders[0])
        self.sketches.forget(holders[0])
        self._keys.pop(holders[0], None)
