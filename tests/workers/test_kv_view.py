"""What a frontend believes of the workers' caches, against what they hold, over losses of every kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from launch.recipe import Kind
from workers.engine.kv_ledger import Ledger
from workers.engine.kv_source import Sequence, Translator
from workers.frontend.kv_view import KvView
from workers.runtime.blocks import chain, root
from workers.runtime.kv_events import Ask, Changes, Page, Tier, decode, encode
from workers.runtime.registry import Card
from workers.runtime.wire import pack

SIZE = 4
NAMES = st.lists(st.integers(0, 30), min_size=1, max_size=8)
TIERS = st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.DISK])
# A loss is healed by a picture, and with it every other mistake: it must not come too often.
LOST = st.sampled_from([False, False, False, False, True])


def card(instance: str, dp_count: int = 1, dp_first: int = 0) -> Card:
    """A worker's card."""
    return Card(
        member=f"aggregated-{instance}",
        instance=instance,
        kind=Kind.AGGREGATED,
        address="",
        metrics="",
        model="m",
        max_model_len=100,
        block_size=SIZE,
        version="v",
        dp_count=dp_count,
        dp_first=dp_first,
    )


@dataclass
class Wire:
    """A view, the workers' ledgers, and NATS between them, which loses what it is told to."""

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    asks: list[Ask] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.view = KvView(lambda member, ask: self.asks.append(ask))

    def start(self, instance: str) -> Ledger:
        """A worker comes."""
        self.ledgers[instance] = Ledger(instance, 0, SIZE)
        self.follow()
        return self.ledgers[instance]

    def follow(self) -> None:
        """The frontend hears who is there."""
        self.view.follow([card(name) for name in self.ledgers])

    def tell(self, ledger: Ledger, lost: bool = False) -> None:
        """A worker tells its changes."""
        self.send(ledger.take(), lost)

    def send(self, message: Changes | Page | None, lost: bool = False) -> None:
        """One message, over the wire."""
        if message is not None and not lost:
            self.view.handle(decode(encode(message)))

    def answer(self, pages: int = 1000) -> None:
        """The workers answer what they were asked, up to a number of pages."""
        asks, self.asks = self.asks, []
        for ask in asks:
            if ask.instance in self.ledgers:
                for _, page in zip(range(pages), self.ledgers[ask.instance].picture(), strict=False):
                    self.send(page)

    def settle(self) -> None:
        """Everything is told, beats reveal what was lost, and asks are answered."""
        for _ in range(3):
            for ledger in self.ledgers.values():
                self.tell(ledger)
                self.send(ledger.beat())
            self.again()
            self.answer()

    def again(self) -> None:
        """As when answers were overdue."""
        for rank in self.view._ranks.values():
            rank.asked = 0.0
        self.view.tick()

    def held(self, instance: str, tier: Tier) -> set[int]:
        """What the view believes that a worker holds, of the first names."""
        rank = self.view._ranks[instance, 0]
        index = self.view.indexes[tier]
        return {name for name in range(31) if index.run(rank.holders[tier], [name], 0)}


class ViewAgainstLedgers(RuleBasedStateMachine):
    """Workers store, remove, clear, come and go; messages are lost; once all is told, the view is right."""

    @initialize()
    def begin(self) -> None:
        """Nobody is there."""
        self.wire = Wire()
        self.started = 0

    def some(self, data: st.DataObject) -> Ledger | None:
        """A worker."""
        names = sorted(self.wire.ledgers)
        return self.wire.ledgers[data.draw(st.sampled_from(names))] if names else None

    @rule()
    def start(self) -> None:
        """A worker comes."""
        if len(self.wire.ledgers) < 3:
            self.started += 1
            self.wire.start(str(self.started))

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A worker goes."""
        if self.wire.ledgers:
            del self.wire.ledgers[data.draw(st.sampled_from(sorted(self.wire.ledgers)))]
            self.wire.follow()

    @rule(data=st.data(), names=NAMES, tier=TIERS)
    def stored(self, data: st.DataObject, names: list[int], tier: Tier) -> None:
        """Blocks come, some for the second time."""
        if ledger := self.some(data):
            ledger.stored(names, tier)

    @rule(data=st.data(), names=NAMES, tier=TIERS)
    def removed(self, data: st.DataObject, names: list[int], tier: Tier) -> None:
        """Blocks go."""
        if ledger := self.some(data):
            ledger.removed(names, tier)

    @rule(data=st.data(), tier=TIERS)
    def cleared(self, data: st.DataObject, tier: Tier) -> None:
        """A tier is emptied."""
        if ledger := self.some(data):
            ledger.cleared(tier)

    @rule(data=st.data(), lost=LOST)
    def tell(self, data: st.DataObject, lost: bool) -> None:
        """A worker tells its changes; they may be lost."""
        if ledger := self.some(data):
            self.wire.tell(ledger, lost)

    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        """A worker beats."""
        if ledger := self.some(data):
            self.wire.send(ledger.beat())

    @rule(pages=st.integers(0, 2))
    def answer(self, pages: int) -> None:
        """Asks are answered, or not wholly."""
        self.wire.answer(pages)

    @rule()
    def late(self) -> None:
        """An answer is overdue."""
        self.wire.again()

    @rule()
    def settled(self) -> None:
        """The view is what the ledgers are."""
        self.wire.settle()
        assert self.wire.view.troubles == []
        for name, ledger in self.wire.ledgers.items():
            for tier in Tier:
                assert self.wire.held(name, tier) == {n for n in range(31) if n in ledger._held[tier]}

    @invariant()
    def nobody_else(self) -> None:
        """Workers that left are not found."""
        found = {key[0] for key in self.wire.view.overlaps([1, 2, 3])}
        assert found <= set(self.wire.ledgers)

    def teardown(self) -> None:
        """However it ended."""
        self.settled()


ViewAgainstLedgers.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_a_view_is_whole_again_after_any_loss = ViewAgainstLedgers.TestCase


def test_changes_alone_keep_a_view_right() -> None:
    """What comes, goes and is cleared, in one message or several, without a second picture."""
    wire = Wire()
    ledger = wire.start("a")
    wire.settle()
    ledger.stored([1, 2, 3])
    wire.tell(ledger)
    assert wire.held("a", Tier.DEVICE) == {1, 2, 3}
    ledger.removed([2])
    ledger.stored([4], Tier.HOST)
    wire.tell(ledger)
    assert (wire.held("a", Tier.DEVICE), wire.held("a", Tier.HOST)) == ({1, 3}, {4})
    ledger.cleared()
    ledger.stored([5])
    wire.tell(ledger)
    assert (wire.held("a", Tier.DEVICE), wire.held("a", Tier.HOST)) == ({5}, {4})
    assert list(wire.view.overlaps([5, 1])) == [("a", 0)]
    assert wire.view.counts.pictures == 1


def test_a_picture_of_many_pages_is_taken_in_whole() -> None:
    """What is told while its pages arrive is applied after it; until it is whole the old one counts."""
    wire = Wire()
    ledger = wire.start("a")
    ledger.stored(range(20_000))
    wire.settle()
    assert wire.view.overlaps(range(20_000))["a", 0].device == 20_000
    ledger.removed(range(19_990, 20_000))
    wire.tell(ledger, lost=True)
    wire.send(ledger.beat())
    first, *rest = ledger.picture()
    assert len(rest) == 2
    wire.send(first)
    ledger.removed(range(19_000, 19_990))
    wire.tell(ledger)
    assert wire.view.overlaps(range(20_000))["a", 0].device == 20_000
    for page in rest:
        wire.send(page)

    assert wire.view.overlaps(range(20_000))["a", 0].device == 19_000
    assert wire.view.counts.pictures == 2


def test_a_worker_that_tells_nothing_is_named() -> None:
    """From its start on, with its own reason where it gives one, and again when it falls silent."""
    wire = Wire()
    ledger = wire.start("a")
    assert wire.view.troubles == ["aggregated-a rank 0 has not told which KV blocks it caches"]
    ledger.trouble = "its engine is mute"
    wire.answer()
    assert wire.view.troubles == ["aggregated-a rank 0: its engine is mute"]
    ledger.trouble = ""
    wire.settle()
    assert wire.view.troubles == []
    wire.view._ranks["a", 0].heard -= 60
    assert wire.view.troubles == ["aggregated-a rank 0 tells no more which KV blocks it caches"]
    wire.view.hears(connected=False)
    assert wire.view.troubles == [], "without NATS nobody can be heard"


def test_far_blocks_go_on_where_near_ones_end() -> None:
    """Host memory counts from the last block of the device on, the disk from there."""
    wire = Wire()
    ledger = wire.start("a")
    ledger.stored([1, 2], Tier.DEVICE)
    ledger.stored([1, 2, 3], Tier.HOST)
    ledger.stored([4, 6], Tier.DISK)
    wire.settle()
    found = wire.view.overlaps([1, 2, 3, 4, 5, 6])["a", 0]

    assert (found.device, found.host, found.disk) == (2, 1, 1)


def test_ranks_are_workers_of_their_own() -> None:
    """By their numbers over all nodes."""
    view = KvView(lambda member, ask: None)
    view.follow([card("a", dp_count=2, dp_first=2)])
    view.handle(next(Ledger("a", 3, SIZE).picture()))

    assert view.troubles == ["aggregated-a rank 2 has not told which KV blocks it caches"]


def stored(tokens: list[int], handles: list[int], parent: int | None = None, **more: object) -> dict[str, object]:
    """An event of vLLM's."""
    return {
        "type": "BlockStored",
        "block_hashes": handles,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": SIZE,
        "medium": "GPU",
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
        **more,
    }


def test_engine_blocks_get_the_names_that_frontends_give_them() -> None:
    """Piece by piece, with an adapter and a salt; a block that the engine holds twice stays until both are gone."""
    ledger = Ledger("a", 0, 16)
    translator = Translator(ledger)
    ids = list(range(16))
    keys = [["ad", "salt"], ["ad"]]
    translator.apply(stored(ids[:8], [71, 72], lora_name="ad", extra_keys=keys))
    translator.apply(stored(ids[8:], [73, 74], 72, lora_name="ad", extra_keys=[["ad"], ["ad"]]))
    names = chain(pack(ids), SIZE, root("ad", "salt"))
    assert ledger.block_size == SIZE
    assert all(ledger.holds(name) for name in names)
    translator.apply(stored(ids[8:12], [73], 72, lora_name="ad", extra_keys=[["ad"]]))
    translator.apply({"type": "BlockRemoved", "block_hashes": [73], "medium": "GPU", "group_idx": 0})
    assert ledger.holds(names[2])
    translator.apply({"type": "BlockRemoved", "block_hashes": [73], "medium": "GPU", "group_idx": 0})
    assert not ledger.holds(names[2])
    translator.apply({"type": "AllBlocksCleared"})
    assert ledger.blocks() == 0


def test_blocks_that_move_to_the_host_are_those_of_the_device() -> None:
    """An offloading connector may tell of hashes alone; those of blocks that nobody told of before are passed over."""
    ledger = Ledger("a", 0, SIZE)
    translator = Translator(ledger)
    bare: dict[str, Any] = {
        "type": "BlockStored",
        "parent_block_hash": None,
        "token_ids": [],
        "block_size": 0,
        "medium": "CPU",
    }
    translator.apply({**bare, "block_hashes": [71]})
    assert (ledger.block_size, ledger.blocks(Tier.HOST)) == (SIZE, 0)
    ids = list(range(8))
    translator.apply(stored(ids, [71, 72], extra_keys=[["salt"], []]))
    translator.apply({**bare, "block_hashes": [72]})
    # As it tells of itself: whole, but for what is not a token.
    translator.apply({**stored(ids, [71, 72]), "medium": "CPU"})
    translator.apply({"type": "BlockRemoved", "block_hashes": [71, 72], "medium": "GPU", "group_idx": 0})
    names = chain(pack(ids), SIZE, root("", "salt"))
    assert (ledger.blocks(), ledger.blocks(Tier.HOST)) == (0, 2)
    assert all(ledger.holds(name) for name in names)
    for _ in range(2):
        translator.apply({"type": "BlockRemoved", "block_hashes": [72], "medium": "CPU", "group_idx": 0})
    translator.apply({"type": "BlockRemoved", "block_hashes": [71], "medium": "CPU", "group_idx": 0})
    assert not any(ledger.holds(name) for name in names)


def test_groups_that_keep_a_part_of_a_prefix_are_passed_over() -> None:
    """A sliding window says nothing of the tokens before it."""
    ledger = Ledger("a", 0, SIZE)
    translator = Translator(ledger)
    translator.apply(stored([1, 2, 3, 4], [7], group_idx=1, kv_cache_spec_kind="sliding_window"))
    translator.apply(stored([1, 2, 3, 4], [7]))
    translator.apply({"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU", "group_idx": 1})

    assert ledger.blocks() == 1


def test_batches_are_put_in_order() -> None:
    """Published and replayed ones, each once; what is lost for good is jumped over."""
    order = Sequence()
    found = [*order.offer(1, b"1"), *order.offer(0, b"0"), *order.offer(1, b"1"), *order.offer(4, b"4")]

    assert found == [b"0", b"1"]
    assert order.gap
    assert order.give_up() == 2
    assert [*order.ready()] == [b"4"]


def test_strangers_messages_are_no_changes() -> None:
    """Whatever they are."""
    for junk in (b"", b"\xc1", msgspec.msgpack.encode(["c", 1])):
        with pytest.raises(msgspec.DecodeError):
            decode(junk)
