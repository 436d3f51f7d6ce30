"""Discovery: workers register themselves in etcd under a lease, frontends follow.

Serve first, then register; withdraw first, then stop. etcd says *where* a worker is; whether it serves is said by the
request plane (`workers.frontend.links`), so that losing etcd loses no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from launch.recipe import Kind
from workers.runtime.etcd import Etcd, EtcdError, LeaseLostError

log = logging.getLogger(__name__)

RETRY_S = 0.3


class Card(msgspec.Struct, kw_only=True, frozen=True):
    """What a worker says of itself. `instance` is new with every start of the process.

    `tasks` are what its engine can do, in vLLM's words (generate, embed, classify, score, ...). `adapters` are the LoRA
    adapters that are loaded now, each served as a model of its own. The engine's data-parallel ranks that this worker
    reaches are `dp_first` up to, not including, `dp_first + dp_count`; a request may name one. Two workers may pass a KV
    cache to each other only if their `fingerprint`s are equal. Each rank has room for `kv_blocks` KV blocks; 0 if unknown.
    """

    member: str
    instance: str
    kind: Kind
    address: str
    metrics: str
    model: str
    max_model_len: int
    block_size: int
    version: str
    tasks: tuple[str, ...] = ("generate",)
    adapters: tuple[str, ...] = ()
    dp_first: int = 0
    dp_count: int = 1
    fingerprint: str = ""
    kv_blocks: int = 0


def key(deployment: str, member: str) -> str:
    """Key of a member's card."""
    return f"{prefix(deployment)}{member}"


def prefix(deployment: str) -> str:
    """Where the cards of a deployment are."""
    return f"/baton/{deployment}/workers/"


class Registration:
    """A card that is kept in etcd, and may change while it is."""

    def __init__(self, etcd: Etcd, deployment: str, card: Card, ttl_s: int) -> None:
        self.card = card
        self.stored = asyncio.Event()
        self._etcd = etcd
        self._name = key(deployment, card.member)
        self._ttl_s = ttl_s
        self._lease = 0
        self._due = True
        self._lock = asyncio.Lock()

    async def update(self, **changes: Any) -> None:
        """Store the card with these fields changed, under the same lease; from now on that is what is kept.

        Raises:
            EtcdError: It could not be stored, and the card before is kept; should etcd have taken the new one without
                saying so, the old one is put back as soon as etcd answers.
        """
        async with self._lock:
            before, self.card = self.card, msgspec.structs.replace(self.card, **changes)
            try:
                await self._put()
            except EtcdError:
                self.card, self._due = before, True
                raise

    async def keep(self) -> None:
        """Store the card and renew its lease; for ever."""
        while True:
            try:
                async with self._lock:
                    if self._due:
                        await self._put()
                self.stored.set()
                await asyncio.sleep(self._ttl_s / 3)
                await self._etcd.keep_alive(self._lease)
            except LeaseLostError:
                log.warning("the registration of %s was lost; registering again", self._name)
                self._lease, self._due = 0, True
            except EtcdError:
                await asyncio.sleep(RETRY_S)

    async def _put(self) -> None:
        value = msgspec.json.encode(self.card)
        try:
            lease = self._lease or await self._etcd.grant(self._ttl_s)
            await self._etcd.put(self._name, value, lease)
        except LeaseLostError:  # etcd came back without its data, and nobody has noticed yet
            lease = await self._etcd.grant(self._ttl_s)
            await self._etcd.put(self._name, value, lease)
        self._lease, self._due = lease, False  # only now: a lease without the card would be kept alive for nothing


class Offer:
    """A worker's card, before, while and after it is registered: changed here first, there as long as there is one."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.registration: Registration | None = None

    async def update(self, **changes: Any) -> None:
        """Change the card.

        Raises:
            EtcdError: It is registered, and the change could not be stored.
        """
        if self.registration:
            await self.registration.update(**changes)
        self.card = msgspec.structs.replace(self.card, **changes)


@contextlib.asynccontextmanager
async def registered(etcd: Etcd, deployment: str, offer: Offer, ttl_s: int) -> AsyncIterator[Registration]:
    """Keep the offer's card registered for as long as the block runs, through losses of etcd and of its data.

    Returns from entering once the card was first stored; withdraws on leaving, if etcd can be reached within 1 s.
    """
    # The offer knows of it at once: a change that cannot be stored yet must not be taken for one that needs no storing.
    registration = offer.registration = Registration(etcd, deployment, offer.card, ttl_s)
    task = asyncio.create_task(registration.keep())
    try:
        await registration.stored.wait()
        yield registration
    finally:
        offer.registration = None  # a change that is under way must not bring the card back
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        with contextlib.suppress(EtcdError, TimeoutError):
            async with asyncio.timeout(1):
                await etcd.delete(key(deployment, offer.card.member))


async def follow(etcd: Etcd, deployment: str, on_cards: Callable[[dict[str, Card]], None]) -> None:
    """Call `on_cards` with all cards of the deployment, by member, now and after each change; for ever.

    While etcd is away nothing is called: what was known last stays known.
    """
    connected = True
    while True:
        try:
            found, revision = await etcd.prefix(prefix(deployment))
            cards = {_member(name): card for name, value in found.items() if (card := _card(name, value))}
            on_cards(dict(cards))
            if not connected:
                log.info("etcd is back")
            connected = True
            async for changes in etcd.watch(prefix(deployment), revision + 1):
                for change in changes:
                    card = None if change.value is None else _card(change.key, change.value)
                    if card is None:
                        cards.pop(_member(change.key), None)
                    else:
                        cards[_member(change.key)] = card
                on_cards(dict(cards))
        except EtcdError as error:
            if connected:
                log.warning("etcd is away (%s); routing goes on with what was known", error)
            connected = False
        await asyncio.sleep(RETRY_S)


def _card(name: str, value: bytes) -> Card | None:
    """None for what is no card: one worker that cannot be understood must not end who follows all of them."""
    try:
        return msgspec.json.decode(value, type=Card)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.error("%s in etcd is not a worker's card (%s); left out", name, error)
        return None


def _member(name: str) -> str:
    return name.rpartition("/")[2]
