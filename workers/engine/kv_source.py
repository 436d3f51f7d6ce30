"""vLLM's KV events as changes of a `Ledger`: read from ZMQ, missed ones asked for again, blocks named by their tokens.

vLLM (0.32) publishes three frames, topic, sequence number and a msgpack batch, and keeps the last ten thousand batches for
whoever asks its replay socket. A subscription may lose messages, at its start above all, so that we ask for everything
first, and again whenever a number is missing. An answer to that also shows that the engine publishes at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import zmq

from workers.engine.kv_ledger import Ledger
from workers.runtime.blocks import chain, extra, root
from workers.runtime.kv_events import Tier
from workers.runtime.sockets import LoopSocket
from workers.runtime.wire import pack

log = logging.getLogger(__name__)

ASK_S = 2.0
SILENT_S = 20.0
END = (2**64 - 1).to_bytes(8, "big")
TIERS = {None: Tier.DEVICE, "GPU": Tier.DEVICE, "CPU": Tier.HOST}  # anything else is further away
# Other groups of layers keep a part of a prefix only (a window, a state), and are no measure of what need not be computed.
WHOLE_PREFIX = frozenset((None, "full_attention", "mla_attention", "sink_full_attention"))
Handle = int | bytes


class Translator:
    """Events of one rank, in vLLM's terms, applied to its ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._names: dict[Handle, int] = {}
        self._passed_over: set[int] = set()
        self._told_size = False

    def apply(self, event: Mapping[str, Any]) -> None:
        """One event; unknown kinds and fields are passed over."""
        match event.get("type"):
            case "BlockStored":
                self._stored(event)
            case "BlockRemoved":
                self._removed(event)
            case "AllBlocksCleared":
                self.cleared()

    def cleared(self) -> None:
        """The engine's own cache lost everything."""
        self._ledger.cleared(Tier.DEVICE)
        self._names = {handle: name for handle, name in self._names.items() if self._ledger.holds(name)}

    def _stored(self, event: Mapping[str, Any]) -> None:
        group = event.get("group_idx")
        if event.get("kv_cache_spec_kind") not in WHOLE_PREFIX:
            self._passed_over.add(group or 0)
            return
        handles: list[Handle] = event["block_hashes"]
        # What moves between tiers was told of before, and of an offloading connector's blocks vLLM may tell nothing but hashes
        # (no tokens, a block size of 0), or leave out what is not a token (`extra_keys`).
        known = [self._names[handle] for handle in handles if handle in self._names]
        if _tier(event) is not Tier.DEVICE and len(known) == len(handles) and (group or 0) not in self._passed_over:
            self._ledger.stored(known, _tier(event))
            return
        size: int = event["block_size"]
        if not size:
            return
        if size != self._ledger.block_size:
            if self._told_size:  # blocks of two sizes: those of the first are what a prompt is cut into
                return
            log.info("the engine's KV events have blocks of %d tokens", size)
            self._ledger.block_size = size
        self._told_size = True
        names = self._name(event, size)
        if len(names) != len(handles):
            return
        self._names.update(zip(handles, names, strict=True))
        self._ledger.stored(names, _tier(event))

    def _name(self, event: Mapping[str, Any], size: int) -> list[int]:
        """Names of the blocks that an event tells of; none where what came before is unknown."""
        adapter = event.get("lora_name") or ""
        keys = [_without(adapter, given) for given in event.get("extra_keys") or ()]
        handle = event.get("parent_block_hash")
        if handle is None:
            words = [key for key in keys[0] if isinstance(key, str)] if keys else []
            parent = root(adapter, words[0] if words else "")
        else:
            known = self._names.get(handle)
            if known is None:
                return []
            parent = known
        pairs = [[(str(key[0]), int(key[1])) for key in given if isinstance(key, list | tuple)] for given in keys]
        extras = {number: extra(found) for number, found in enumerate(pairs) if found}
        return chain(pack(event["token_ids"]), size, parent, extras)

    def _removed(self, event: Mapping[str, Any]) -> None:
        if (event.get("group_idx") or 0) in self._passed_over:
            return
        tier = _tier(event)
        for handle in event["block_hashes"]:
            name = self._names.get(handle)
            if name is not None:
                self._ledger.removed((name,), tier)
                if not self._ledger.holds(name):
                    del self._names[handle]


def _tier(event: Mapping[str, Any]) -> Tier:
    medium = event.get("medium")
    return TIERS.get(medium, Tier.DISK)


def _without(adapter: str, keys: Any) -> list[Any]:
    """A block's extra keys less the adapter's name, which vLLM puts first."""
    found = list(keys or ())
    return found[1:] if adapter and found[:1] == [adapter] else found


class Sequence:
    """Puts numbered batches in order, whether they were published or replayed, and says what is missing."""

    def __init__(self) -> None:
        self.next = 0
        self._early: dict[int, bytes] = {}

    def offer(self, number: int, payload: bytes) -> Iterator[bytes]:
        """The batches whose turn it is now."""
        if number >= self.next:
            self._early[number] = payload
        yield from self.ready()

    def ready(self) -> Iterator[bytes]:
        """Those before which nothing is missing."""
        while (found := self._early.pop(self.next, None)) is not None:
            self.next += 1
            yield found

    @property
    def gap(self) -> bool:
        """Whether something is missing before what is here."""
        return bool(self._early)

    def give_up(self) -> int:
        """Go on after the gap; returns how many batches are lost."""
        first = min(self._early)
        lost, self.next = first - self.next, first
        return lost


class EventSource:
    """The events of one rank, for as long as `run` runs."""

    def __init__(self, context: zmq.Context[Any], events: str, replay: str, topic: str, ledger: Ledger) -> None:
        self._ledger = ledger
        self._where = events
        self._sequence = Sequence()
        self._asked = 0.0
        self._asked_for_gap = False
        self._answered = time.monotonic()
        self.translator = Translator(ledger)
        self.batches = 0
        self.lost = 0
        ledger.trouble = f"its engine's KV events at {events} are not heard"
        self._events = LoopSocket(context, zmq.SUB, self._on_published)
        self._events.raw.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self._events.raw.connect(events)
        self._replay = LoopSocket(context, zmq.DEALER, self._on_replayed)
        self._replay.raw.connect(replay)

    async def run(self) -> None:
        """Ask for what is missing, and see that the engine answers; for ever."""
        try:
            while True:
                if time.monotonic() - self._asked >= ASK_S:
                    self._ask()
                if time.monotonic() - self._answered > SILENT_S and not self._ledger.trouble:
                    self._ledger.trouble = f"its engine's KV events at {self._where} are not heard any more"
                    log.warning("%s", self._ledger.trouble)
                await asyncio.sleep(ASK_S / 4)
        finally:
            self._events.close()
            self._replay.close()

    def _ask(self) -> None:
        """Ask for everything from the first missing batch on; the answer is at least its end."""
        self._asked = time.monotonic()
        self._asked_for_gap = self._sequence.gap
        self._replay.send([b"", self._sequence.next.to_bytes(8, "big")])

    def _on_published(self, parts: list[bytes]) -> None:
        if len(parts) != 3:
            return
        self._apply(self._sequence.offer(int.from_bytes(parts[1], "big"), parts[2]))
        if self._sequence.gap and time.monotonic() - self._asked > ASK_S / 4:
            self._ask()

    def _on_replayed(self, parts: list[bytes]) -> None:
        if len(parts) != 4:
            return
        if parts[2] != END:
            self._apply(self._sequence.offer(int.from_bytes(parts[2], "big"), parts[3]))
            return
        self._answered = time.monotonic()
        if self._sequence.gap and not self._asked_for_gap:
            self._ask()  # what is missing may be younger than this answer
        elif self._sequence.gap:
            # vLLM does not remember that far back. Wrong blocks would draw requests for ever; missing ones come back.
            lost = self._sequence.give_up()
            self.lost += lost
            log.warning("%d batches of KV events are lost; beginning anew with an empty picture", lost)
            self.translator.cleared()
            self._ledger.cleared(Tier.HOST)
            self._ledger.cleared(Tier.DISK)
            self._apply(self._sequence.ready())
        if self._ledger.trouble:
            self._ledger.trouble = ""
            log.info("KV events of the engine at %s are heard", self._where)

    def _apply(self, batches: Iterator[bytes]) -> None:
        for batch in batches:
            self.batches += 1
            with contextlib.suppress(msgspec.DecodeError):
                for event in msgspec.msgpack.decode(batch)[1]:
                    try:
                        self.translator.apply(event)
                    except (KeyError, TypeError, AttributeError) as error:
                        log.warning("a KV event has another form than vLLM 0.32's: %s: %s", type(error).__name__, error)
