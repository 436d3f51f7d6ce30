"""A worker is chosen as the mode promises."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from launch.recipe import RouterMode
from workers.frontend.router import mode


@dataclass
class Worker:
    """What a mode looks at."""

    in_flight: int = 0
    waiting: int = 0


@given(st.integers(1, 9), st.integers(1, 200))
def test_round_robin_differs_by_one_at_most(workers: int, requests: int) -> None:
    """However many there are."""
    choose = mode(RouterMode.ROUND_ROBIN)
    counts = Counter(choose([Worker()] * workers) for _ in range(requests))

    assert max(counts.values()) - min(counts.get(i, 0) for i in range(workers)) <= 1


@given(st.lists(st.builds(Worker, st.integers(0, 50), st.integers(0, 50)), min_size=1), st.integers(0, 5))
def test_least_loaded_never_passes_over_a_less_loaded_worker(workers: list[Worker], earlier: int) -> None:
    """Its own requests and what the engine reports count alike."""
    choose = mode(RouterMode.LEAST_LOADED)
    for _ in range(earlier):
        choose(workers)
    chosen = workers[choose(workers)]

    assert chosen.in_flight + chosen.waiting == min(item.in_flight + item.waiting for item in workers)


def test_least_loaded_spreads_a_burst_over_equals() -> None:
    """Requests that come before any load is known do not all go to the first."""
    choose = mode(RouterMode.LEAST_LOADED)
    counts = Counter(choose([Worker(), Worker(), Worker()]) for _ in range(30))

    assert counts == {0: 10, 1: 10, 2: 10}
