"""The command and environment of every child of an agent; pure, so that a dry run shows what will be started."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.plan import Member
from launch.recipe import Recipe
from slurm.limit import ENDS_AT
from workers.engine.arguments import Place, engine_environment

MODEL_PATH = "BATON_MODEL_PATH"


@dataclass(frozen=True, slots=True)
class Invocation:
    """A command, and what its environment has beyond the agent's own."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def engine(
    recipe: Recipe,
    member: Member,
    run_dir: Path,
    place: Place,
    visible: Sequence[str] | None = None,
    fabric: Mapping[str, str] | None = None,
    model: str | None = None,
) -> Invocation:
    """The process of an engine member, by the recipe of its model; its slots count within `visible`, the GPUs that the rank was given.

    `fabric` is what its libraries are told of the node's network; the recipe's own environment wins over it. `model` is the
    node's own copy of the model, if it has one.
    """
    own = {MODEL_PATH: model} if model is not None and model != recipe.model.path else {}
    argv = (sys.executable, "-m", "workers.engine", str(run_dir), member.name)
    return Invocation(argv, {**(fabric or {}), **own, **engine_environment(recipe, member, place, visible)})


def frontend(name: str, run_dir: Path, ends_at: float | None = None) -> Invocation:
    """A frontend process; `ends_at` is when Slurm ends the job, in seconds since the epoch.

    It tokenizes in threads of its own; the tokenizer's would only pass single texts to and fro.
    """
    waiting = spare_frontend(run_dir, ends_at)
    return Invocation((*waiting.argv, name), waiting.env)


def spare_frontend(run_dir: Path, ends_at: float | None = None) -> Invocation:
    """A process that becomes a frontend once it is told which (`slurm.spare`)."""
    env = {"TOKENIZERS_PARALLELISM": "false"}
    if ends_at is not None:
        env[ENDS_AT] = f"{ends_at:.0f}"
    return Invocation((sys.executable, "-m", "workers.frontend", str(run_dir)), env)
