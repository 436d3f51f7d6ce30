"""The router's own book: what is under way at each worker, so that requests which come faster than reports still spread.

It holds this frontend's requests, exactly; those of the other frontends, as they told a moment ago; and, where a worker
reports that it uses more blocks than both account for (answers that grew, requests of a frontend that has restarted), the rest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

REPORT_VALID_S = 3.0
OTHER_VALID_S = 3.0

Key = tuple[str, int]
"""A worker's instance and one of its data-parallel ranks."""


@dataclass(slots=True)
class Load:
    """What is under way: requests, the KV blocks of their prompts, and prompt tokens that are still to be computed."""

    requests: int = 0
    blocks: int = 0
    tokens: int = 0

    def add(self, other: Load) -> None:
        """Count another load too."""
        self.requests += other.requests
        self.blocks += other.blocks
        self.tokens += other.tokens


class Booking:
    """One leg of a request in the book, from `begin` to `end`; each may come more than once."""

    __slots__ = ("_book", "_key", "_open", "blocks", "tokens")

    def __init__(self, book: Book, key: Key, blocks: int, tokens: int) -> None:
        self._book = book
        self._key = key
        self._open = False
        self.blocks = blocks
        self.tokens = tokens

    def begin(self) -> None:
        """The leg was sent."""
        if not self._open:
            self._open = True
            self._book.change(self._key, 1, self.blocks, self.tokens)

    def prefilled(self) -> None:
        """Its prompt is computed."""
        if self._open and self.tokens:
            self._book.change(self._key, 0, 0, -self.tokens)
            self.tokens = 0

    def end(self) -> None:
        """It is over."""
        if self._open:
            self._open = False
            self._book.change(self._key, -1, -self.blocks, -self.tokens)


@dataclass(slots=True)
class _Other:
    """What another frontend told last."""

    at: float
    loads: dict[Key, Load] = field(default_factory=dict)


class Book:
    """Loads by worker and rank."""

    def __init__(self) -> None:
        self.own: dict[Key, Load] = {}
        """Of this frontend; keys without load are left out."""
        self.changed = False
        """Whether `own` has changed since somebody cleared this."""
        self._others: dict[str, _Other] = {}
        self._excess: dict[Key, tuple[int, float]] = {}

    def change(self, key: Key, requests: int, blocks: int, tokens: int) -> None:
        """Add to this frontend's load."""
        load = self.own.get(key)
        if load is None:
            load = self.own[key] = Load()
        load.requests += requests
        load.blocks += blocks
        load.tokens += tokens
        if not load.requests:
            del self.own[key]
        self.changed = True

    def load(self, key: Key) -> Load:
        """All that is under way there, as far as is known."""
        total = self._booked(key)
        excess, at = self._excess.get(key, (0, 0.0))
        if excess and time.monotonic() - at < REPORT_VALID_S:
            total.blocks += excess
        return total

    def pressure(self, key: Key) -> tuple[int, int]:
        """Blocks and tokens of `load`; what the router asks for every worker and request."""
        if self._others or key in self._excess:
            load = self.load(key)
            return load.blocks, load.tokens
        own = self.own.get(key)
        return (own.blocks, own.tokens) if own is not None else (0, 0)

    def reported(self, key: Key, blocks: int) -> None:
        """A worker says how many blocks are in use."""
        excess = blocks - self._booked(key).blocks
        if excess > 0:
            self._excess[key] = (excess, time.monotonic())
        else:
            self._excess.pop(key, None)

    def told(self, frontend: str, loads: Iterable[tuple[Key, Load]]) -> None:
        """Another frontend says what it has under way; this replaces what it said before."""
        self._others[frontend] = _Other(time.monotonic(), dict(loads))

    def forget(self, instances: set[str]) -> None:
        """Keep nothing of workers but of these, and nothing of frontends that fell silent."""
        self._excess = {key: excess for key, excess in self._excess.items() if key[0] in instances}
        now = time.monotonic()
        self._others = {name: other for name, other in self._others.items() if now - other.at < OTHER_VALID_S}

    def _booked(self, key: Key) -> Load:
        total = Load()
        own = self.own.get(key)
        if own is not None:
            total.add(own)
        if self._others:
            now = time.monotonic()
            for other in self._others.values():
                load = other.loads.get(key)
                if load is not None and now - other.at < OTHER_VALID_S:
                    total.add(load)
        return total
