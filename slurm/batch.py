"""The batch script: a pure function of the recipe, its plan and where its files are; and what no job may ask for.

The script is the same whether `python -m launch` submits it or a person does: when nobody has prepared the run directory,
it does that itself. Every trap of Slurm and submitit that it goes around is named where it does.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from launch.errors import SubmitError
from launch.plan import Plan
from launch.recipe import Cluster, Limit, Recipe
from launch.records import RunDirectory
from slurm.environments import exported, interpreter

# Our agents decide who ends, not Slurm: a dead node or task must not take the others along. --wait and --kill-on-bad-exit
# are the site's choice where they are not given.
STEP_ARGS = ("--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--mpi=none", "--cpu-bind=none")
# Seconds that everything takes to end once the last request has been answered.
LEAVE_S = 30
# Slurm's notice comes up to this much early.
EARLY_S = 60
# What a cache is called below cluster.cache_dir, by the variable that moves it.
CACHES = {
    "HF_HOME": "huggingface",
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_HOME": "torch",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "MIOPEN_USER_DB_PATH": "miopen",
    "XDG_CACHE_HOME": "xdg",
    "APPTAINER_CACHEDIR": "apptainer",
}
ONE_TASK = "the plan gives every node one agent: change the recipe's counts"
# Flags that no job of ours can have, with what to do instead.
REFUSED = {
    "array": "an array would start one deployment several times in one run directory: launch each under a name of its own",
    "nodes": "the plan decides it: change the recipe's counts",
    "ntasks": ONE_TASK,
    "ntasks-per-node": ONE_TASK,
    "ntasks-per-gpu": ONE_TASK,
    "gpus-per-task": "it hides the GPUs of a node from each other: cluster.gpu_request=gpus-per-node={n}",
    "requeue": "a job that begins again would take the records of its earlier life for the present: launch again",
    "hetjob": "a heterogeneous job runs one step for each component, and steps of several cannot exchange RDMA on Slingshot: "
    "choose one kind of node that serves prefill and decode, or launch aggregated engines on each kind",
    "output": "agents and members have logs of their own, in the run directory",
    "error": "agents and members have logs of their own, in the run directory",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a job is told of: its run directory, the attempt, and the words that made the recipe."""

    run_dir: Path
    attempt: int
    overrides: tuple[str, ...]
    begin_in_s: int = 0
    """Seconds before which the job is not to begin; the script does not say so, the call of sbatch does."""
    extension: int | None = None
    """Number of the extension that the job is, for one that joins a live deployment."""

    @property
    def folder(self) -> Path:
        """Where the agents' logs go."""
        return RunDirectory(self.run_dir).logs(self.attempt)


def script(recipe: Recipe, plan: Plan, asked: Submission) -> str:
    """The batch script, to the letter, as it is submitted."""
    return str(
        _make_sbatch_string(command=task_command(recipe, asked), folder=asked.folder, **parameters(recipe, plan, asked))
    )


def task_command(recipe: Recipe, asked: Submission) -> str:
    """What each task runs, as shell text.

    Not submitit's own entry: that ignores SIGTERM before our first line, and needs a pickle that only it writes.
    """
    python = interpreter(recipe, asked.run_dir).command
    joins = "" if asked.extension is None else f" {asked.extension}"
    return f"{python} -u -m slurm.task {shlex.quote(str(asked.run_dir))} {asked.attempt}{joins}"


def step_args(recipe: Recipe, run_dir: Path) -> tuple[str, ...]:
    """The arguments of the one step's srun."""
    return (
        *STEP_ARGS,
        *recipe.cluster.srun_args,
        *interpreter(recipe, run_dir).srun_args,
        *recipe.slurm.srun_args,
    )


def parameters(recipe: Recipe, plan: Plan, asked: Submission) -> dict[str, Any]:
    """The job, in submitit's names; one task for each node."""
    batch, cluster = recipe.slurm, recipe.cluster
    # A requeued job would find the records of its own earlier life and take them for the present. Without B: the notice
    # goes to the tasks; with it, only to the batch shell. The batch shell's own output goes to the run directory (see
    # _setup), which is not there yet when a person submits.
    more: dict[str, Any] = {
        "no-kill": True,
        "no-requeue": True,
        "signal": f"USR1@{notice_s(recipe)}",
        "output": "/dev/null",
    }
    if cluster.gpu_request and recipe.engine.device == "cuda":
        flag, _, value = cluster.gpu_request.format(n=cluster.gpus_per_node).partition("=")
        more[flag] = value
    given = {
        "partition": batch.partition,
        "account": account(cluster, batch.account),
        "qos": batch.qos,
        "constraint": batch.constraint,
        "cpus_per_task": batch.cpus_per_task,
        "mem": batch.mem,
        "exclusive": batch.exclusive or None,
    }
    return {
        "job_name": recipe.name,
        "time": batch.time_min,
        "nodes": plan.ranks,
        "ntasks_per_node": 1,
        "setup": _setup(recipe, asked),
        "srun_args": list(step_args(recipe, asked.run_dir)),
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own default is refused by sites that check it
        "additional_parameters": more | dict(cluster.sbatch) | dict(batch.sbatch),
        **{name: value for name, value in given.items() if value is not None},
    }


def account(cluster: Cluster, given: str | None) -> str | None:
    """The account in the form that the cluster has for its GPUs."""
    if given is None or cluster.account_form is None:
        return given
    before, _, after = cluster.account_form.partition("{account}")
    whole = given.startswith(before) and given.endswith(after) and len(given) > len(before) + len(after)
    return given if whole else cluster.account_form.replace("{account}", given)


def exports(recipe: Recipe) -> list[str]:
    """Lines of shell for the environment that the cluster asks for."""
    cluster = recipe.cluster
    lines = [f"unset {' '.join(cluster.unset)}"] if cluster.unset else []
    if cluster.cache_dir:
        lines += [exported(name, f"{cluster.cache_dir}/{part}", default_only=True) for name, part in CACHES.items()]
    return lines + [exported(name, value) for name, value in cluster.env.items()]


def _setup(recipe: Recipe, asked: Submission) -> list[str]:
    """What the batch shell does before srun; its output goes to the run directory first of all."""
    run, python = shlex.quote(str(asked.run_dir)), interpreter(recipe, asked.run_dir)
    lines = [f"mkdir -p -m 700 {run} && exec >> {run}/batch_$SLURM_JOB_ID.log 2>&1 || exit 1"]
    # Since Slurm 22.05 srun no longer takes over what sbatch was given. The job's other flags it does, but not if the
    # submitting shell had them in its environment as well: --export=NONE would go on to the tasks.
    lines += ["export SLURM_EXPORT_ENV=ALL"]
    if recipe.slurm.cpus_per_task:
        lines += [f"export SRUN_CPUS_PER_TASK={recipe.slurm.cpus_per_task}"]
    lines += [*exports(recipe), *python.setup, *recipe.cluster.setup, *recipe.slurm.setup]
    if asked.extension is not None:
        return lines
    lines += [
        "# `python -m launch` prepares the run directory before it submits; without it, this script does.",
        f"[ -d {shlex.quote(str(asked.folder))} ] || {{",
        f"{python.in_batch_shell()} -m launch.prepare {run} {asked.attempt} <<'BATON'",
        *asked.overrides,
        "BATON",
        "} || exit 1",
    ]
    return lines


def notice_s(recipe: Recipe) -> int:
    """Seconds before the time limit at which Slurm sends USR1; it may come `EARLY_S` earlier."""
    return math.ceil(recipe.engine.drain_s) + LEAVE_S


def shortest_min(recipe: Recipe) -> int:
    """The least time limit that leaves time to serve."""
    return (notice_s(recipe) + EARLY_S) // 60 + 1


def refuse(recipe: Recipe, plan: Plan, environ: Mapping[str, str]) -> None:
    """Refuse a job that this cluster would refuse, or that would not do what was meant, before it is queued.

    Args:
        recipe: The recipe.
        plan: Its plan.
        environ: Environment of the submission; sbatch reads flags from it too.

    Raises:
        SubmitError: Says what to change.
    """
    batch, cluster = recipe.slurm, recipe.cluster
    for flag, why in REFUSED.items():
        if flag in batch.sbatch:
            raise SubmitError(f"slurm.sbatch.{flag}={batch.sbatch[flag]} is refused: {why}")
    flags = {name.replace("_", "-"): value for name, value in _flags(recipe).items() if value not in (None, False)}
    for flag, why in cluster.refused.items():
        if flag in flags:
            key = f"slurm.{flag}" if flag in ("mem", "exclusive", "qos", "constraint") else f"slurm.sbatch.{flag}"
            raise SubmitError(f"{key}={flags[flag]} is refused on {cluster.name}: {why}")
    if cluster.account_required and batch.account is None and not environ.get("SBATCH_ACCOUNT"):
        form = f" (it looks like {cluster.account_form.format(account='NAME')})" if cluster.account_form else ""
        raise SubmitError(f"{cluster.name} bills every job to an account: add slurm.account=<yours>{form}")
    shortest = shortest_min(recipe)
    if batch.time_min < shortest:
        raise SubmitError(
            f"slurm.time_min={batch.time_min} leaves no time to serve: Slurm's notice comes up to "
            f"{notice_s(recipe) + EARLY_S} s before the end; use at least {shortest}, or a smaller engine.drain_s"
        )
    _refuse_over_limits(recipe, plan)


def _refuse_over_limits(recipe: Recipe, plan: Plan) -> None:
    batch = recipe.slurm
    limits = [
        limit
        for limit in recipe.cluster.limits
        if (limit.partition in (None, batch.partition)) and (limit.qos in (None, batch.qos))
    ]
    # A limit that names a QOS is more to the point than one that only names the partition.
    limits = [limit for limit in limits if limit.qos] or limits
    if not limits or any(_allows(limit, plan.ranks, batch.time_min) for limit in limits):
        return
    raise SubmitError(
        f"{recipe.cluster.name} takes no job of {plan.ranks} nodes for {batch.time_min} minutes in "
        f"{_where(batch.partition, batch.qos)}; it takes {'; '.join(_spelled(limit) for limit in limits)}: change "
        "slurm.time_min, slurm.partition, slurm.qos, or the recipe's counts"
    )


def _allows(limit: Limit, nodes: int, time_min: int) -> bool:
    return limit.nodes_min <= nodes <= (limit.nodes or nodes) and time_min <= (limit.time_min or time_min)


def _where(partition: str | None, qos: str | None) -> str:
    named = [f"partition {partition}" if partition else "", f"QOS {qos}" if qos else ""]
    return " and ".join(name for name in named if name) or "its default partition"


def _spelled(limit: Limit) -> str:
    if limit.nodes_min > 1:
        nodes = f"{limit.nodes_min} to {limit.nodes} nodes" if limit.nodes else f"{limit.nodes_min} nodes and more"
    else:
        nodes = f"up to {limit.nodes} nodes" if limit.nodes else "any number of nodes"
    return f"{nodes} for {limit.time_min} minutes" if limit.time_min else nodes


def _flags(recipe: Recipe) -> dict[str, Any]:
    batch = recipe.slurm
    request = recipe.cluster.gpu_request if recipe.engine.device == "cuda" else None
    gpus = {request.partition("=")[0]: request} if request else {}
    named = {name: getattr(batch, name) for name in ("mem", "exclusive", "qos", "constraint", "partition")}
    return named | gpus | dict(recipe.cluster.sbatch) | dict(batch.sbatch)


def submitted_words(overrides: Sequence[str]) -> tuple[str, ...]:
    """The words that make a recipe again, on another machine: without those about this one call."""
    gone = {"dry_run", "wait", "runs_dir", "launcher", "chain"}
    return tuple(word for word in overrides if word.partition("=")[0].lstrip("+") not in gone)
