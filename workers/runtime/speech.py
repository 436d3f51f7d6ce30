"""A recording that is to be written down or translated, on its way from a frontend to a worker: the body of a `wire.Call`."""

from __future__ import annotations

import msgspec


class Recording(msgspec.Struct, array_like=True):
    """What a client uploaded: the form's fields in its order, and the file as it came.

    With `stream` the worker answers with server-sent events as they come, else with one JSON object.
    """

    fields: list[tuple[str, str]]
    file: bytes
    filename: str
    stream: bool


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Recording).decode
