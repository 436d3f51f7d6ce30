"""Which router a recipe gets, and whether engines tell what they cache."""

from __future__ import annotations

import pytest

from launch.compose import read
from launch.errors import ConfigError
from launch.recipe import RouterMode

NO_CACHE = "engine.args.enable_prefix_caching=false"
ECHO = "engine.backend=echo"


@pytest.mark.parametrize(
    ("overrides", "mode", "events"),
    [
        pytest.param(["+recipe=tiny_2p2d"], RouterMode.KV, True, id="a choice"),
        pytest.param(["+recipe=tiny_dp2"], RouterMode.KV, True, id="a choice of ranks"),
        pytest.param(["+recipe=tiny_disagg"], RouterMode.LEAST_LOADED, False, id="no choice"),
        pytest.param(["+recipe=tiny_disagg", "frontend.router=kv"], RouterMode.KV, True, id="asked for"),
        pytest.param(["+recipe=tiny_2p2d", NO_CACHE], RouterMode.LEAST_LOADED, False, id="nothing cached"),
        pytest.param(
            ["+recipe=tiny_2p2d", "roles.decode.args.enable_prefix_caching=false"],
            RouterMode.LEAST_LOADED,
            False,
            id="not everywhere cached",
        ),
        pytest.param(["+recipe=tiny_2p2d", "frontend.router=random"], RouterMode.RANDOM, False, id="another mode"),
        pytest.param(
            ["+recipe=tiny_2p2d", "frontend.router=random", "engine.kv_events=true"],
            RouterMode.RANDOM,
            True,
            id="events for somebody else",
        ),
        pytest.param(
            ["+recipe=tiny_2p2d", "frontend.router=kv", "engine.kv_events=false"], RouterMode.KV, False, id="guesses"
        ),
        pytest.param(
            ["+recipe=tiny_2p2d", "engine.kv_events=false"], RouterMode.LEAST_LOADED, False, id="events forbidden"
        ),
        pytest.param(["+recipe=tiny_2p2d", ECHO], RouterMode.LEAST_LOADED, False, id="echo"),
        pytest.param(
            ["+recipe=tiny_2p2d", ECHO, "engine.echo_cache_blocks=9", "frontend.router=kv"],
            RouterMode.KV,
            True,
            id="echo with a cache",
        ),
    ],
)
def test_the_router_is_the_one_that_fits(overrides: list[str], mode: RouterMode, events: bool) -> None:
    """By KV cache where there is something to choose from and something cached; events only where they are of use."""
    recipe = read(overrides).recipe

    assert recipe.router is mode
    assert recipe.publishes_kv_events is events


@pytest.mark.parametrize("overrides", [[NO_CACHE], [ECHO]])
def test_following_caches_that_are_none_is_refused(overrides: list[str]) -> None:
    """And says what would do."""
    with pytest.raises(ConfigError, match=r"engine\.kv_events=false"):
        read(["+recipe=tiny_2p2d", "frontend.router=kv", *overrides])


def test_weights_below_zero_are_refused() -> None:
    """Naming them."""
    with pytest.raises(ConfigError, match="router_overlap_weight"):
        read(["+recipe=tiny_2p2d", "frontend.router_overlap_weight=-1"])
