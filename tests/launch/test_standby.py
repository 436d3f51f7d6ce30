"""Who may lead, and what runs there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.compose import read
from launch.errors import PlanError
from launch.plan import Plan, plan
from launch.recipe import Launcher, Recipe, Standby
from launch.standby import control_ranks, frontend_place, frontends_on


def planned(*words: str) -> tuple[Recipe, Plan]:
    """A recipe with one engine on each node, and its plan."""
    recipe = read(["+recipe=tiny_2p2d", "engine.backend=echo", "cluster=slurm_cpu", *words]).recipe
    return recipe, plan(recipe)


@pytest.mark.parametrize(
    ("words", "launcher", "expected"),
    [
        pytest.param((), Launcher.SLURM, (0, 1, 2), id="four-nodes"),
        pytest.param(("control.standby=true",), Launcher.SLURM, (0, 1, 2), id="wanted"),
        pytest.param(("control.standby=false",), Launcher.SLURM, (0,), id="not-wanted"),
        pytest.param(("roles.decode.replicas=1",), Launcher.LOCAL, (0, 1, 2), id="three-nodes"),
        pytest.param(("roles.decode.replicas=1", "roles.prefill.replicas=1"), Launcher.SLURM, (0,), id="two-nodes"),
        pytest.param((), Launcher.DEBUG, (0,), id="one-process"),
    ],
)
def test_three_ranks_may_lead_where_there_are_as_many(
    words: tuple[str, ...], launcher: Launcher, expected: tuple[int, ...]
) -> None:
    """Else rank 0 alone."""
    recipe, _ = planned(*words)
    assert control_ranks(recipe, launcher) == expected


def test_a_standby_without_the_nodes_for_it_is_refused_with_their_number() -> None:
    """auto takes what there is; true is a wish that cannot be met."""
    recipe, _ = planned("roles.decode.replicas=1", "roles.prefill.replicas=1")
    wanted = replace(recipe, control=replace(recipe.control, standby=Standby.YES))
    with pytest.raises(PlanError, match="needs 3 nodes and the deployment has 2"):
        control_ranks(wanted, Launcher.SLURM)


def test_a_frontend_knows_its_place_by_its_name() -> None:
    """Rank and index, and back."""
    _, where = planned("frontend.processes=2")
    assert frontends_on(where, 0) == ("frontend-0", "frontend-1")
    assert [frontend_place(where, name) for rank in (0, 2) for name in frontends_on(where, rank)] == [
        (0, 0),
        (0, 1),
        (2, 0),
        (2, 1),
    ]
    with pytest.raises(PlanError, match="no frontend 'frontend-2'"):
        frontend_place(where, "frontend-2")
