"""Which adapters a worker has, kept in the run directory, so that the worker that is started in its place loads them again.

One file for each member: what one worker was told is not what another was told. It belongs to one launch; the next begins
without adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from launch import records

log = logging.getLogger(__name__)


class _Content(msgspec.Struct):
    submitted_at: float
    adapters: dict[str, str]


class KeptAdapters:
    """The folder of each adapter, by its name."""

    def __init__(self, path: Path, submitted_at: float) -> None:
        self._path = path
        self._submitted_at = submitted_at

    def read(self) -> dict[str, str]:
        """What was kept last in this launch; nothing where the file is missing or broken."""
        try:
            content = records.read_bytes(self._path)
            if content is None:
                return {}
            kept = msgspec.json.decode(content, type=_Content)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("%s cannot be read (%s): no adapters are loaded from it", self._path, error)
            return {}
        return kept.adapters if kept.submitted_at == self._submitted_at else {}

    def write(self, adapters: Mapping[str, str]) -> None:
        """Keep these instead. Failing is logged and no more: the adapters that are loaded serve all the same."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            records.write(self._path, msgspec.json.encode(_Content(self._submitted_at, dict(adapters))))
        except OSError as error:
            log.warning("%s cannot be written (%s): a restarted worker will lack adapters", self._path, error)
