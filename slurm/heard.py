"""Which ranks are not heard any more, by our own clock: those of nodes differ, and a pause of ours is nobody's silence."""

from __future__ import annotations

import math
from collections.abc import Mapping

from launch.records import SILENT_AFTER_S, RankRecord
from workers.runtime.awake import AwakeClock


class Heard:
    """When each rank's record last changed; `look` often."""

    def __init__(self, silent_after_s: float = SILENT_AFTER_S) -> None:
        self._silent_after_s = silent_after_s
        self._clock = AwakeClock()
        self._last: dict[int, tuple[float, float]] = {}

    def look(self, ranks: Mapping[int, RankRecord]) -> None:
        """Take note of what the ranks last wrote."""
        self._clock.tick()
        for rank, record in ranks.items():
            heartbeat, _ = self._last.get(rank, (0.0, 0.0))
            if record.heartbeat != heartbeat:
                self._last[rank] = (record.heartbeat, self._clock.now)

    def doubt(self, record: RankRecord) -> None:
        """Take a rank for silent until it is heard anew: there is other news that it is."""
        self._last[record.rank] = (record.heartbeat, -math.inf)

    def silent(self, rank: int) -> bool:
        """Whether a rank that was heard once has not written for a while."""
        return rank in self._last and self._clock.now - self._last[rank][1] > self._silent_after_s

    def lost(self, ranks: Mapping[int, RankRecord]) -> list[int]:
        """The ranks that fell silent without having said that they end."""
        return sorted(rank for rank, record in ranks.items() if not record.ended and self.silent(rank))
