"""The matrices of slurm.pairs as a picture: rates on the left, latencies on the right; a row is where from, a column where to.

Green is the median or better, red as slow as the verdict names it or slower; grey was not measured, white is a node itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from slurm.pairs import SLOW_LATENCY, SLOW_RATE, Matrix, verdict

Colour = tuple[int, int, int]

GREEN, YELLOW, RED = (26, 152, 80), (254, 224, 139), (215, 48, 39)
GREY, WHITE = (160, 160, 160), (255, 255, 255)
WIDEST = 512
CELL = 32


def picture(asked: Matrix) -> bytes:
    """The PNG; names of the nodes, in order, are its text `nodes`, as a picture of pixels has no letters."""
    told = verdict(asked)
    cell = max(1, min(CELL, WIDEST // max(1, len(asked.names))))
    rows = []
    for a in range(len(asked.names)):
        left = [_rate(value, told.gb_per_s, a == b) for b, value in enumerate(asked.gb_per_s[a])]
        right = [_latency(value, told.latency_us, a == b) for b, value in enumerate(asked.latency_us[a])]
        wide = [colour for colour in (*left, WHITE, *right) for _ in range(cell)]
        rows += [wide] * cell
    return png(rows, {"nodes": " ".join(asked.names), "over": asked.over})


def shade(badness: float) -> Colour:
    """From green (0 and less) over yellow (a half) to red (1 and more)."""
    at = min(1.0, max(0.0, badness)) * 2
    low, high, share = (GREEN, YELLOW, at) if at <= 1 else (YELLOW, RED, at - 1)
    red, green, blue = (round(first + (last - first) * share) for first, last in zip(low, high, strict=True))
    return red, green, blue


def png(rows: Sequence[Sequence[Colour]], texts: dict[str, str]) -> bytes:
    """Pixels as a PNG of 8 bits a colour (https://www.w3.org/TR/png-3/)."""
    width, height = len(rows[0]) if rows else 0, len(rows)
    lines = b"".join(b"\0" + bytes(value for colour in row for value in colour) for row in rows)
    chunks = [
        _chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *(_chunk(b"tEXt", f"{key}\0{value}".encode("latin-1", "replace")) for key, value in texts.items()),
        _chunk(b"IDAT", zlib.compress(lines, 9)),
        _chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack("!I", len(content)) + kind + content + struct.pack("!I", zlib.crc32(kind + content))


def _rate(value: float | None, median: float | None, itself: bool) -> Colour:
    if value is None or not median:
        return WHITE if itself else GREY
    return shade((1 - value / median) / (1 - SLOW_RATE))


def _latency(value: float | None, median: float | None, itself: bool) -> Colour:
    if value is None or not median:
        return WHITE if itself else GREY
    return shade((value / median - 1) / (SLOW_LATENCY - 1))
