"""The index of KV blocks says what a naive model says, whatever happens in whatever order."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from workers.frontend.block_index import BlockIndex
from workers.runtime.blocks import chain, media_extras, pack_names, root, unpack_names
from workers.runtime.wire import pack

NAMES = st.integers(0, 40)
SOME = st.lists(NAMES, max_size=12)


class IndexAgainstSets(RuleBasedStateMachine):
    """The index beside a set of blocks for each holder."""

    @initialize()
    def begin(self) -> None:
        """An empty index of few shards, so that names share them."""
        self.index = BlockIndex(shards=4)
        self.model: dict[int, set[int]] = {}
        self.hidden: set[int] = set()
        self.sweeping: Any = None

    def one(self, data: st.DataObject) -> int | None:
        """A holder, if there is one."""
        return data.draw(st.sampled_from(sorted(self.model))) if self.model else None

    @rule(shown=st.booleans())
    def join(self, shown: bool) -> None:
        """A worker comes; its number belongs to nobody else."""
        if len(self.model) < 6:
            holder = self.index.join(shown)
            assert holder not in self.model
            self.model[holder] = set()
            if not shown:
                self.hidden.add(holder)

    @rule(data=st.data())
    def show(self, data: st.DataObject) -> None:
        """A snapshot is whole."""
        holder = self.one(data)
        if holder is not None:
            self.index.show(holder)
            self.hidden.discard(holder)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A worker is gone."""
        holder = self.one(data)
        if holder is not None:
            self.index.leave(holder)
            del self.model[holder]
            self.hidden.discard(holder)

    @rule(data=st.data(), names=SOME)
    def stored(self, data: st.DataObject, names: list[int]) -> None:
        """Blocks come."""
        holder = self.one(data)
        if holder is not None:
            self.index.stored(holder, names)
            self.model[holder] |= set(names)

    @rule(data=st.data(), names=SOME)
    def removed(self, data: st.DataObject, names: list[int]) -> None:
        """Blocks go, known or not."""
        holder = self.one(data)
        if holder is not None:
            self.index.removed(holder, names)
            self.model[holder] -= set(names)

    @rule(steps=st.integers(1, 5))
    def sweep(self, steps: int) -> None:
        """Some steps of a sweep, with anything in between."""
        for _ in range(steps):
            if self.sweeping is None:
                self.sweeping = self.index.sweep()
            if next(self.sweeping, "end") == "end":
                self.sweeping = None

    @rule(names=SOME, also=st.dictionaries(NAMES, st.integers(0, 63), max_size=5))
    def overlap(self, names: list[int], also: dict[int, int]) -> None:
        """The search for all holders finds an end of each: it has the block before and lacks the one after."""
        holds = {
            holder: [name in held or bool(also.get(name, 0) >> holder & 1) for name in names]
            for holder, held in self.model.items()
            if holder not in self.hidden
        }
        found = self.index.overlap(names, also)
        assert set(found) == {holder for holder, has in holds.items() if has and has[0]}
        for holder, depth in found.items():
            assert holds[holder][depth - 1]
            assert depth == len(names) or not holds[holder][depth]

    @rule(data=st.data(), names=SOME, also=st.integers(0, 12))
    def overlap_without_gaps(self, data: st.DataObject, names: list[int], also: int) -> None:
        """Where nobody has gaps, the search finds what one walk for each finds, expected blocks counted with those told."""
        names = [1000 + number for number, _ in enumerate(names)]
        depths = {}
        for holder in self.model:
            depth = data.draw(st.integers(0, len(names)))
            self.index.removed(holder, names)
            self.index.stored(holder, names[: max(0, depth - also)])
            if depth and holder not in self.hidden:
                depths[holder] = depth
        expected: dict[int, int] = {}
        for holder, depth in depths.items():
            for name in names[max(0, depth - also) : depth]:
                expected[name] = expected.get(name, 0) | 1 << holder
        assert self.index.overlap(names, expected) == depths
        for holder in self.model:
            self.index.removed(holder, names)

    @rule(data=st.data(), names=SOME, start=st.integers(0, 12))
    def run_on(self, data: st.DataObject, names: list[int], start: int) -> None:
        """What one holder has from a block on."""
        holder = self.one(data)
        if holder is not None and holder not in self.hidden:
            rest = names[start:]
            gaps = [number for number, name in enumerate(rest) if name not in self.model[holder]]
            assert self.index.run(holder, names, start) == (gaps[0] if gaps else len(rest))

    @invariant()
    def clean_after_a_sweep(self) -> None:
        """Nothing is kept for those who left once all were swept."""
        if self.sweeping is None and not self.index.littered:
            assert len(self.index) == len(set().union(*self.model.values()))


IndexAgainstSets.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_the_index_agrees_with_sets = IndexAgainstSets.TestCase

IDS = st.lists(st.integers(0, 3), max_size=40)
SIZES = st.integers(1, 7)


@given(IDS, IDS, SIZES)
def test_names_are_equal_as_far_as_prompts_are(one: list[int], other: list[int], size: int) -> None:
    """And no further: equal tokens after a difference do not meet again."""
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    names, others = chain(pack(one), size, root()), chain(pack(other), size, root())

    assert len(names) == len(one) // size
    for number, (name, another) in enumerate(zip(names, others, strict=False)):
        assert (name == another) is ((number + 1) * size <= same)


@given(IDS, SIZES, st.integers(0, 5))
def test_a_chain_may_be_cut_anywhere(ids: list[int], size: int, at: int) -> None:
    """A worker that hears of blocks piece by piece names them as a frontend that sees the whole prompt."""
    whole = chain(pack(ids), size, root("adapter"))
    cut = min(at, len(whole))
    first = chain(pack(ids[: cut * size]), size, root("adapter"))
    second = chain(pack(ids[cut * size :]), size, first[-1] if first else root("adapter"))

    assert first + second == whole


@given(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4), st.text(max_size=4))
def test_adapters_and_salts_keep_prompts_apart(adapter: str, salt: str, adapter2: str, salt2: str) -> None:
    """Whatever their names are."""
    assert (root(adapter, salt) == root(adapter2, salt2)) is ((adapter, salt) == (adapter2, salt2))


def test_a_picture_changes_the_blocks_it_is_in_and_all_after() -> None:
    """Not those before; the same picture at the same place is the same block."""
    ids = pack([7] * 32)
    plain, cat, dog = (
        chain(ids, 4, root(), media_extras(4, media)) for media in ([], [("cat", 10, 6)], [("dog", 10, 6)])
    )
    same = [[a == b for a, b in zip(one, other, strict=True)] for one, other in ((plain, cat), (cat, dog))]

    assert same == [[True, True, *[False] * 6]] * 2
    assert cat == chain(ids, 4, root(), media_extras(4, [("cat", 10, 6)]))


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_names_travel_unchanged(names: list[int]) -> None:
    """As packed numbers."""
    assert unpack_names(pack_names(names)) == names


def test_who_leaves_during_a_sweep_is_swept_by_the_next() -> None:
    """Its number is not given away before."""
    index = BlockIndex(shards=4)
    first, second = index.join(), index.join()
    index.stored(first, range(8))
    index.stored(second, range(8))
    index.leave(first)
    sweep = index.sweep()
    next(sweep)
    index.leave(second)
    list(sweep)
    assert index.littered
    assert index.join() == first
    list(index.sweep())

    assert len(index) == 0
    assert index.join() == second
