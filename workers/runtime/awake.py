"""A clock that stands still while this process does: how long others have been silent *while we listened*.

A laptop that was closed, a frozen or swapped out process, a loop that was held up: when it goes on, everything that was
last heard before looks old, though nobody fell silent. The clock advances with each tick of its owner's loop, and by no
more than `LONGEST_TICK_S` at a time, so that whoever speaks is heard before he is given up.
"""

from __future__ import annotations

import time

LONGEST_TICK_S = 0.5


class AwakeClock:
    """Seconds since it was made, pauses left out; `tick` it often, read `now` anywhere."""

    def __init__(self) -> None:
        self.now = 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        """Advance; returns the seconds of the pause that was left out, mostly 0."""
        elapsed = time.monotonic() - self._last
        self._last += elapsed
        self.now += min(elapsed, LONGEST_TICK_S)
        return max(0.0, elapsed - LONGEST_TICK_S)
