"""Bodies that come packed: gzip is unpacked, to no more than a body may have; anything else is refused."""

from __future__ import annotations

import asyncio
import zlib

from workers.frontend.errors import ApiError
from workers.frontend.http import Request

GZIP = 16 + zlib.MAX_WBITS  # zlib's sign for the gzip format


async def unpacked(request: Request, max_bytes: int) -> None:
    """Replace a packed body by what is in it.

    Raises:
        ApiError: 415, the coding is unknown; 413, there is too much in it; 400, it is damaged.
    """
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("identity", ""):
        return
    if coding not in ("gzip", "x-gzip"):
        raise ApiError(415, f"bodies of Content-Encoding {coding!r} are not taken: send gzip, or plain")
    request.body = await asyncio.to_thread(gunzip, request.body, max_bytes)


def gunzip(packed: bytes, max_bytes: int) -> bytes:
    """What is in a gzip file of one member.

    Raises:
        ApiError: As `unpacked` says.
    """
    unpacker = zlib.decompressobj(GZIP)
    try:
        found = unpacker.decompress(packed, max_bytes + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body is not gzip: {error}") from error
    if len(found) > max_bytes:
        raise ApiError(413, f"the request's body is larger than {max_bytes} bytes when unpacked")
    if not unpacker.eof:
        raise ApiError(400, "the body is not whole: its gzip ends early")
    return found
