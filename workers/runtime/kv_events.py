"""What workers tell frontends of their KV caches over NATS: changes as they come, a whole picture when it is asked for.

Subjects: `baton.<deployment>.kv.<member>` for `Changes`; `baton.<deployment>.kv_ask.<member>` for `Ask`, whose reply
subject gets the `Page`s of the picture. Blocks have the names of `workers.runtime.blocks`, whatever the engine calls them,
so that a frontend has nothing to translate.

Each data-parallel rank numbers its changes from 1. Every `BEAT_S` it tells the last number again: a frontend that has
another has missed something, and asks for the picture. Changes are of states (a block is there, or not), so that those
that were told both by a picture and after it do no harm.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from workers.runtime.events import token

FLUSH_S = 0.02
BEAT_S = 1.0
PAGE_BLOCKS = 8192


class Tier(IntEnum):
    """Where a block is, from near to far."""

    DEVICE = 0
    HOST = 1
    DISK = 2


NO_BLOCKS = (b"",) * len(Tier)


class Changes(msgspec.Struct, array_like=True, tag="c"):
    """What has changed in the caches of one rank since the number before; a beat if nothing has, and `number` is the last.

    `cleared` are tiers that lost everything, before the blocks of `stored` came; `stored` and `removed` are packed names
    for each tier. `trouble` is why the worker cannot tell what its engine caches, or empty.
    """

    instance: str
    rank: int
    number: int
    block_size: int
    cleared: tuple[int, ...] = ()
    stored: tuple[bytes, ...] = NO_BLOCKS
    removed: tuple[bytes, ...] = NO_BLOCKS
    beat: bool = False
    trouble: str = ""


class Ask(msgspec.Struct, array_like=True, tag="a"):
    """Ask a worker for the picture of one rank."""

    instance: str
    rank: int


class Page(msgspec.Struct, array_like=True, tag="p"):
    """A part of the picture of one rank as of a number; the last one has `last`. The pages of one picture share `picture`."""

    instance: str
    rank: int
    number: int
    picture: int
    block_size: int
    stored: tuple[bytes, ...]
    last: bool
    trouble: str = ""


encode = msgspec.msgpack.Encoder().encode
_from_worker: msgspec.msgpack.Decoder[Changes | Page] = msgspec.msgpack.Decoder(Changes | Page)
_to_worker: msgspec.msgpack.Decoder[Ask] = msgspec.msgpack.Decoder(Ask)


def decode(payload: bytes) -> Changes | Page:
    """What a worker told.

    Raises:
        msgspec.DecodeError: It is nothing of the kind.
    """
    return _from_worker.decode(payload)


def decode_ask(payload: bytes) -> Ask:
    """What a frontend asks.

    Raises:
        msgspec.DecodeError: It is nothing of the kind.
    """
    return _to_worker.decode(payload)


def changes_subject(deployment: str, member: str) -> str:
    """Where a member tells its changes; `*` for all."""
    return f"baton.{token(deployment)}.kv.{token(member)}"


def ask_subject(deployment: str, member: str) -> str:
    """Where a member is asked for a picture."""
    return f"baton.{token(deployment)}.kv_ask.{token(member)}"
