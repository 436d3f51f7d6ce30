"""Pairs of a prefill and a decode worker that cannot reach each other, though the frontend reaches both.

A decode worker says so of a pull. For a while the two are not put together: prompts go to another prefill worker, or the
answer to another decode worker, or the decode worker computes the prompt itself. After that while a request tries again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

AVOID_S = 30.0


class Pairs:
    """The pairs that were found cut within the last `avoid_s`, by instance; `now` is in seconds."""

    def __init__(self, avoid_s: float = AVOID_S, now: Callable[[], float] = time.monotonic) -> None:
        self._avoid_s = avoid_s
        self._now = now
        self._until: dict[tuple[str, str], float] = {}

    def cut(self, source: str, target: str) -> None:
        """The decode worker `target` could not reach the prefill worker `source`."""
        self._until = {pair: until for pair, until in self._until.items() if until > self._now()}
        if (source, target) not in self._until:
            log.warning("instance %s cannot pull from %s; not tried for %.0f s", target, source, self._avoid_s)
        self._until[source, target] = self._now() + self._avoid_s

    def targets(self, source: str) -> set[str]:
        """Decode workers that cannot pull from this prefill worker."""
        return {target for (one, target), until in self._until.items() if one == source and until > self._now()}

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return any(until > self._now() for until in self._until.values())
