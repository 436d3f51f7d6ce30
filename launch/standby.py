"""Which ranks may lead a deployment, and what runs on them for that; pure, so that everybody computes the same.

The *head* is the rank that oversees: it publishes the endpoint, and its frontends are the ones that clients are sent to. It
is rank 0 at first. With a standby, ranks 0 to 2 each run a member of etcd and of NATS and frontends that serve as well, so
that another of the three becomes head when the head's node dies (`slurm.head`). Who is head now says
`launch.records.RunDirectory.head`.
"""

from __future__ import annotations

from launch.errors import PlanError
from launch.plan import Plan, plan
from launch.recipe import Launcher, Recipe, Standby

CONTROL_RANKS = 3
UNCOVERED = "rank 0's node is not covered: if it dies, the deployment ends"


def control_ranks(recipe: Recipe, launcher: Launcher) -> tuple[int, ...]:
    """The ranks that run the control plane: three, or rank 0 alone.

    Three is what survives the loss of one; with two, the loss of either would stop both. All ranks of the debug launcher
    are one process, so that none of them can outlive another. What joins a deployment later changes nothing here.

    Raises:
        PlanError: A standby is wanted and there are too few ranks for it.
    """
    wanted, ranks = recipe.control.standby, plan(recipe).ranks
    if wanted is Standby.YES and ranks < CONTROL_RANKS:
        raise PlanError(
            f"control.standby=true needs {CONTROL_RANKS} nodes and the deployment has {ranks}: a node more than that "
            "must be left when one dies; use control.standby=auto, or more replicas"
        )
    if wanted is Standby.NO or ranks < CONTROL_RANKS or launcher is Launcher.DEBUG:
        return (0,)
    return tuple(range(CONTROL_RANKS))


def on_rank(name: str, rank: int) -> str:
    """Name of a frontend or server on a rank that may lead: `etcd` on rank 0, `etcd.1` on rank 1."""
    return name if rank == 0 else f"{name}.{rank}"


def frontends_on(where: Plan, rank: int) -> tuple[str, ...]:
    """The frontends of a rank that may lead."""
    return tuple(on_rank(name, rank) for name in where.frontends)


def frontend_place(where: Plan, name: str) -> tuple[int, int]:
    """Rank of a frontend, and its index there.

    Raises:
        PlanError: There is none of that name.
    """
    base, _, rank = name.partition(".")
    if base not in where.frontends or (rank and not rank.isdigit()):
        raise PlanError(f"no frontend {name!r} in the plan: {', '.join(where.frontends)}")
    return int(rank or 0), where.frontends.index(base)
