"""`preflight.on_bad_node=resubmit`: after a preflight that failed, the same deployment on other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launch.compose import Launch
from launch.errors import ConfigError
from launch.recipe import Launcher, OnBadNode, Wait
from slurm.exclusion import MOST_RESUBMISSIONS, bad_ranks, excluding, node_of
from slurm.preflight import Report

EXCLUDE = "exclude"


def check(asked: Launch) -> None:
    """Refuse what could not be done when a node fails, before anything is submitted.

    Raises:
        ConfigError: Says what to change.
    """
    if asked.recipe.preflight.on_bad_node is not OnBadNode.RESUBMIT:
        return
    cluster = asked.recipe.cluster
    if EXCLUDE in cluster.refused:
        raise ConfigError(
            f"preflight.on_bad_node=resubmit names nodes to leave out, and {cluster.name} takes no job that does "
            f"({cluster.refused[EXCLUDE]}): use exclude_and_shrink, or fail"
        )
    if asked.launcher is not Launcher.SLURM:
        raise ConfigError(
            f"preflight.on_bad_node=resubmit is for launcher=slurm, and this is launcher={asked.launcher}: use fail"
        )
    if asked.wait is Wait.NO:
        raise ConfigError(
            "preflight.on_bad_node=resubmit needs somebody who submits again: use wait=ready, or exclude_and_shrink"
        )


def again(asked: Launch, reports: Sequence[Report], tried: int) -> Launch | None:
    """What to submit next, after `tried` submissions that failed; None when that is all. Pure."""
    recipe = asked.recipe
    if recipe.preflight.on_bad_node is not OnBadNode.RESUBMIT or tried > MOST_RESUBMISSIONS:
        return None
    bad = bad_ranks(reports, recipe)
    nodes = [node_of(report) for report in reports if report.rank in bad]
    if not nodes:
        return None
    without = excluding(recipe.slurm.sbatch.get(EXCLUDE), nodes)
    batch = replace(recipe.slurm, sbatch=dict(recipe.slurm.sbatch) | {EXCLUDE: without})
    words = [word for word in asked.overrides if word.lstrip("+").partition("=")[0] != f"slurm.sbatch.{EXCLUDE}"]
    return replace(
        asked,
        recipe=replace(recipe, slurm=batch),
        overrides=(*words, f"slurm.sbatch.{EXCLUDE}='{without}'"),
    )
