"""The frontend's side of what is told over NATS for routing: workers' caches, and the books of the other frontends.

Frontends tell each other totals, not requests: what one has under way at each worker, anew every `TELL_S` in which it has
changed and every `BEAT_S` in any case, and the blocks of the prompts that it has sent since. So nothing has to be matched,
and a message that is lost is made good by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from launch.records import Control
from workers.frontend.book import Book, Key, Load
from workers.frontend.kv_view import KvView
from workers.runtime.blocks import pack_names, unpack_names
from workers.runtime.events import connect, token
from workers.runtime.kv_events import BEAT_S, Ask, ask_subject, changes_subject, decode, encode
from workers.runtime.registry import Card

log = logging.getLogger(__name__)

MAX_SENT = 1000  # prompts to tell the others of, while nobody can be told
TELL_S = 0.05
TICK_S = 0.25


class Told(msgspec.Struct, array_like=True):
    """A frontend's book: (instance, rank, requests, blocks, tokens) of each worker with load; (instance, rank, names, whether they
    are those of a sketch) sent.
    """

    frontend: str
    loads: list[tuple[str, int, int, int, int]]
    sent: list[tuple[str, int, bytes, bool]]


class KvPlane:
    """Keeps a view of caches and a book of loads up to date; `keep` must run meanwhile."""

    def __init__(self, control: Control, deployment: str, name: str, alone: bool) -> None:
        """Make it; a frontend that is `alone` tells nobody what it does."""
        self._control = control
        self._deployment = deployment
        self._name = name
        self._alone = alone
        self._life = f"{name}/{secrets.token_hex(4)}"
        self._asks: list[tuple[str, Ask]] = []
        self._sent: list[tuple[str, int, bytes, bool]] = []

    def ask(self, member: str, ask: Ask) -> None:
        """Ask a member for a picture, soon."""
        self._asks.append((member, ask))

    def routed(self, key: Key, names: Sequence[int], sketched: bool) -> None:
        """A prompt with these blocks was sent there."""
        if not self._alone and names and len(self._sent) < MAX_SENT:
            self._sent.append((*key, pack_names(names), sketched))

    async def keep(self, view: KvView, book: Book, cards: Callable[[], Iterable[Card]]) -> None:
        """Follow, and tell; for ever. `cards` are the workers that there are."""
        client = await connect(self._control, f"{self._name}-kv")
        answers = client.new_inbox()

        async def on_changes(message: Msg) -> None:
            with contextlib.suppress(msgspec.DecodeError):
                view.handle(decode(message.data))

        async def on_told(message: Msg) -> None:
            with contextlib.suppress(msgspec.DecodeError):
                self._hear(view, book, msgspec.msgpack.decode(message.data, type=Told))

        try:
            await client.subscribe(answers, cb=on_changes)
            await client.subscribe(changes_subject(self._deployment, "*"), cb=on_changes)
            if not self._alone:
                await client.subscribe(_book_subject(self._deployment), cb=on_told)
            ticked = told = 0.0
            while True:
                now = time.monotonic()
                if now - ticked >= TICK_S:
                    ticked = now
                    known = list(cards())
                    view.follow(known)
                    book.forget({card.instance for card in known})
                    view.hears(client.is_connected)
                    view.tick()
                    await _sweep(view)
                if client.is_connected:
                    await self._send_asks(client, answers)
                    if not self._alone and (book.changed or self._sent or now - told >= BEAT_S):
                        told = now
                        await self._tell(client, book)
                else:  # old by the time that somebody could hear it; the view asks again
                    self._asks, self._sent = [], []
                await asyncio.sleep(TELL_S)
        finally:
            await client.close()

    async def _send_asks(self, client: Client, answers: str) -> None:
        asks, self._asks = self._asks, []
        with contextlib.suppress(nats.errors.Error):  # the view asks again
            for member, ask in asks:
                await client.publish(ask_subject(self._deployment, member), encode(ask), reply=answers)

    async def _tell(self, client: Client, book: Book) -> None:
        loads = [(*key, load.requests, load.blocks, load.tokens) for key, load in book.own.items()]
        told = Told(self._life, loads, self._sent)
        self._sent, book.changed = [], False
        with contextlib.suppress(nats.errors.Error):  # the next one says it again
            await client.publish(_book_subject(self._deployment), encode(told))

    def _hear(self, view: KvView, book: Book, told: Told) -> None:
        if told.frontend == self._life:
            return
        book.told(told.frontend, (((instance, rank), Load(*load)) for instance, rank, *load in told.loads))
        for instance, rank, names, sketched in told.sent:
            view.expect((instance, rank), unpack_names(names), sketched)


async def _sweep(view: KvView) -> None:
    """Take out what workers that left have left behind, a few milliseconds at a time."""
    for index in view.indexes:
        if index.littered:
            for _ in index.sweep():
                await asyncio.sleep(0)


def _book_subject(deployment: str) -> str:
    return f"baton.{token(deployment)}.book"
