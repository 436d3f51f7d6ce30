"""Which worker holds which KV block: a table from a block's name to the set of its holders.

A holder is a number, and a set of them an integer with one bit for each, so that a prompt is looked up once for all workers.
Names are chained (`workers.runtime.blocks`), so that a block needs no parent here, and engines drop a prompt's end before its
beginning: who has a block has those before it. So a prompt is searched by halves for the places where holders end, and of
its hundreds of blocks a dozen are looked at. The table is cut into shards by the names' low bits: a dictionary that grows is copied as a whole, and a shard is
copied in a few milliseconds where the whole would hold up the event loop for a second.

A holder that left is forgotten at once, for its bit counts no more; `sweep` takes its bits out, shard by shard, and only
then its number is given to another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

SHARDS = 256
NOTHING: Mapping[int, int] = {}


class BlockIndex:
    """The blocks of any number of holders."""

    def __init__(self, shards: int = SHARDS) -> None:
        """Make an empty index; `shards` is a power of two."""
        self._shards: list[dict[int, int]] = [{} for _ in range(shards)]
        self._low = shards - 1
        self._known: dict[int, int] = {}  # equal sets are one object: ten million blocks share a few of them
        self._taken = 0
        self._shown = 0
        self._left = 0
        self.blank = True
        """Whether it never had a block: a tier that no worker uses is not looked at for each request."""

    def join(self, shown: bool = True) -> int:
        """The number of a new holder without blocks; unless `shown`, it is not found before `show`."""
        holder = 0
        while self._taken >> holder & 1:
            holder += 1
        self._taken |= 1 << holder
        if shown:
            self.show(holder)
        return holder

    def show(self, holder: int) -> None:
        """Let a holder be found."""
        self._shown |= 1 << holder

    def leave(self, holder: int) -> None:
        """Forget a holder and all its blocks; harmless when it has left."""
        bit = 1 << holder
        if self._taken & bit:
            self._shown &= ~bit
            self._left |= bit

    def stored(self, holder: int, names: Iterable[int]) -> None:
        """The holder has these blocks."""
        bit, shards, low, known = 1 << holder, self._shards, self._low, self._known
        self.blank = False
        for name in names:
            shard = shards[name & low]
            holders = shard.get(name, 0) | bit
            shard[name] = known.setdefault(holders, holders)

    def removed(self, holder: int, names: Iterable[int]) -> None:
        """The holder has them no more; harmless for those that it never had."""
        bit, shards, low, known = 1 << holder, self._shards, self._low, self._known
        for name in names:
            shard = shards[name & low]
            before = shard.get(name, 0)
            if before & bit:
                holders = before & ~bit
                if holders:
                    shard[name] = known.setdefault(holders, holders)
                else:
                    del shard[name]

    def overlap(self, names: Sequence[int], also: Mapping[int, int] = NOTHING) -> dict[int, int]:
        """How many blocks from the first on each holder has; those that lack the first are left out.

        Where every holder of a block has those before it too, the numbers are exact. Of a holder with gaps it is that of one
        of its runs: it has the block before that number, and lacks the one at it.

        Args:
            names: A prompt's blocks.
            also: More holders of blocks, as sets; counted as if they were in the index.
        """
        found: dict[int, int] = {}
        if not names:
            return found
        shards, low = self._shards, self._low
        name = names[0]
        first = (shards[name & low].get(name, 0) | also.get(name, 0)) & self._shown
        if not first:
            return found
        name = names[-1]
        last = (shards[name & low].get(name, 0) | also.get(name, 0)) & first
        if last:
            _note(found, last, len(names))
        # Who has block `before` and lacks block `after` ends in between: halve, as long as the two sets differ.
        halves = [(0, len(names) - 1, first, last)] if first != last else []
        while halves:
            before, after, had, has = halves.pop()
            if after - before == 1:
                _note(found, had & ~has, after)
                continue
            middle = (before + after) >> 1
            name = names[middle]
            holders = (shards[name & low].get(name, 0) | also.get(name, 0)) & had | has
            if holders != has:
                halves.append((middle, after, holders, has))
            if holders != had:
                halves.append((before, middle, had, holders))
        return found

    def run(self, holder: int, names: Sequence[int], start: int) -> int:
        """How many blocks from number `start` on a holder has without a gap."""
        bit, shards, low = 1 << holder & self._shown, self._shards, self._low
        for number in range(start, len(names)):
            name = names[number]
            if not shards[name & low].get(name, 0) & bit:
                return number - start
        return max(len(names) - start, 0)

    def __len__(self) -> int:
        """Number of different blocks, those of holders that have left included until `sweep`."""
        return sum(map(len, self._shards))

    @property
    def littered(self) -> bool:
        """Whether there is something to sweep."""
        return self._left != 0

    def sweep(self) -> Iterator[None]:
        """Take out what holders that left have left behind; each step takes a few milliseconds at most.

        The index may be used between steps. Whoever leaves meanwhile waits for the next sweep.
        """
        gone = self._left
        keep = ~gone
        self._known.clear()
        known = self._known
        for number, shard in enumerate(self._shards):
            self._shards[number] = {
                name: known.setdefault(holders, holders) for name, before in shard.items() if (holders := before & keep)
            }
            yield
        self._left &= keep
        self._taken &= keep


def _note(found: dict[int, int], holders: int, depth: int) -> None:
    while holders:
        lowest = holders & -holders
        found[lowest.bit_length() - 1] = depth
        holders ^= lowest
