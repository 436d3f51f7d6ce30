"""Responses that are kept for later requests to go on from: files in the run directory, so that every frontend has them.

One file each, written aside and renamed, readable by the owner alone. The oldest are dropped once there are too many.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from launch.records import write

NAME = re.compile(r"resp_[0-9a-f]{24}")
SWEEP_EVERY = 64


class Stored(msgspec.Struct, kw_only=True):
    """A response, what was given to it, and the conversation that it answered, its instructions apart."""

    response: msgspec.Raw
    input: list[Any]
    messages: list[dict[str, Any]]


class Store:
    """At most about `limit` responses in a folder, which is made when it is needed. Methods block."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._writes = itertools.count(1)

    @property
    def keeps(self) -> bool:
        """Whether anything is kept."""
        return self._limit > 0

    def put(self, name: str, stored: Stored) -> None:
        """Keep a response."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        write(self._folder / name, msgspec.json.encode(stored), mode=0o600)
        if next(self._writes) % SWEEP_EVERY == 0:
            self._sweep()

    def get(self, name: str) -> Stored | None:
        """A response by its id; None when it is not kept, or not any more."""
        if not NAME.fullmatch(name):
            return None
        try:
            return msgspec.json.decode((self._folder / name).read_bytes(), type=Stored)
        except FileNotFoundError:
            return None

    def drop(self, name: str) -> bool:
        """Forget a response; False when it was not kept."""
        if not NAME.fullmatch(name):
            return False
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _sweep(self) -> None:
        found = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another frontend sweeps too
                found.append((entry.stat().st_mtime, entry.path))
        for _, path in sorted(found)[: max(0, len(found) - self._limit)]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
