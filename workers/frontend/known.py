"""The workers that a frontend knew last, kept in a file: one that starts while etcd is away asks those.

They may have gone meanwhile. That shows on their links, as it does for any worker, and etcd corrects the view when it is back.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from launch.records import read_bytes, write
from workers.frontend.links import Links
from workers.runtime.registry import Card

log = logging.getLogger(__name__)

KEEP_S = 1.0


class Known:
    """The file of one frontend and attempt."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Card]:
        """The cards by member; none where there is no file, or one that cannot be read."""
        try:
            return msgspec.json.decode(read_bytes(self._path) or b"{}", type=dict[str, Card])
        except (OSError, ValueError) as error:
            log.warning("the workers known before cannot be read: %s", error)
            return {}

    async def keep(self, links: Links) -> None:
        """Write whenever it changes who is registered or heard; for ever. A full disk costs this view and nothing else."""
        written = self.read()
        while True:
            await asyncio.sleep(KEEP_S)
            cards = {link.card.member: link.card for link in links if link.listed or link.usable}
            if not cards or cards == written:  # that nobody is there is said by an etcd that lost its data, too
                continue
            try:
                await asyncio.to_thread(write, self._path, msgspec.json.encode(cards), 0o600)
                written = cards
            except OSError as error:
                log.debug("the workers cannot be written down: %s", error)
