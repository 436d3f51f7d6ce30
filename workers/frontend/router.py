"""Choose the worker for a leg of a request. A pure decision over what the links know; KV-aware modes will join here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

from launch.recipe import RouterMode


class Candidate(Protocol):
    """What a mode may look at."""

    @property
    def in_flight(self) -> int:
        """Streams that this frontend has open there."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that the engine has queued, of all frontends, as last reported."""
        ...


Mode = Callable[[Sequence[Candidate]], int]


def mode(name: RouterMode) -> Mode:
    """A function from candidates (never empty) to the index of the one to use."""
    turn = itertools.count()

    def round_robin(candidates: Sequence[Candidate]) -> int:
        return next(turn) % len(candidates)

    def least_loaded(candidates: Sequence[Candidate]) -> int:
        # Equal loads take turns: a burst that arrives before the first report must spread.
        first, count = next(turn), len(candidates)
        ranked = [
            (candidate.in_flight + candidate.waiting, (index - first) % count, index)
            for index, candidate in enumerate(candidates)
        ]
        return min(ranked)[2]

    return {RouterMode.ROUND_ROBIN: round_robin, RouterMode.LEAST_LOADED: least_loaded}[name]
