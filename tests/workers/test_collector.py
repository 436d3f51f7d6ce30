"""What lives as long as the process costs the collector of cycles nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from workers.runtime.collector import for_good


@pytest.fixture
def thawed() -> Iterator[None]:
    """The collector as it was."""
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("thawed")
def test_what_is_made_for_good_is_never_looked_at() -> None:
    """Neither meanwhile, however much it is, nor by a collection afterwards; what comes later is, as before."""
    gc.collect()
    before = sum(generation["collections"] for generation in gc.get_stats())
    with for_good():
        kept = [[number] for number in range(100_000)]
        meanwhile = sum(generation["collections"] for generation in gc.get_stats())
    looked_at = {id(thing) for thing in gc.get_objects()}
    later: list[object] = []
    later.append(later)
    del later

    assert meanwhile == before
    assert not looked_at & {id(thing) for thing in kept}
    assert gc.collect() >= 1


@pytest.mark.usefixtures("thawed")
def test_the_collector_is_on_again_after_an_error() -> None:
    """An engine whose configuration was refused must not leave a process that only grows."""
    with pytest.raises(ValueError, match="refused"), for_good():
        raise ValueError("refused")

    assert gc.isenabled()
