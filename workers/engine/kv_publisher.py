"""Tells the frontends what a worker's engine caches: changes every `FLUSH_S`, beats, and pictures to those who ask."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from launch.records import Control
from workers.engine.kv_ledger import Ledger
from workers.runtime.events import connect
from workers.runtime.kv_events import BEAT_S, FLUSH_S, ask_subject, changes_subject, decode_ask, encode

log = logging.getLogger(__name__)


async def publish_kv(
    control: Control, deployment: str, member: str, instance: str, ledgers: Mapping[int, Ledger]
) -> None:
    """Publish what the ledgers of a worker's ranks hold, for ever.

    While NATS is away nothing is taken from the ledgers: what changes meanwhile adds up, and is told in one when it is back.
    """
    client = await connect(control, f"{member}-kv")
    subject = changes_subject(deployment, member)

    async def on_ask(message: Msg) -> None:
        with contextlib.suppress(msgspec.DecodeError, nats.errors.Error):
            ask = decode_ask(message.data)
            if ask.instance == instance and ask.rank in ledgers:
                for page in ledgers[ask.rank].picture():
                    await client.publish(message.reply, encode(page))

    try:
        await client.subscribe(ask_subject(deployment, member), cb=on_ask)
        beat_at = 0.0
        while True:
            if client.is_connected:
                beat_at = await _tell(client, subject, ledgers, beat_at)
            await asyncio.sleep(FLUSH_S)
    finally:
        await client.close()


async def _tell(client: Client, subject: str, ledgers: Mapping[int, Ledger], beat_at: float) -> float:
    """Publish changes, and beats when they are due; returns when they are next."""
    now = time.monotonic()
    try:
        for ledger in ledgers.values():
            changes = ledger.take()
            if changes is not None:
                await client.publish(subject, encode(changes))
            if now >= beat_at:
                await client.publish(subject, encode(ledger.beat()))
    except nats.errors.Error as error:  # what is lost leaves a gap in the numbers, and frontends ask for the picture
        log.debug("NATS: %s", error)
    return now + BEAT_S if now >= beat_at else beat_at
