"""Submission through submitit: the same agents as a Slurm job, as processes of this machine, or inside this process."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from launch.errors import PlanError, SubmitError
from launch.plan import Plan
from launch.recipe import Launcher, Recipe
from slurm import task
from slurm.hosts import VISIBLE_DEVICES, devices_here

# Our agents decide who ends, not Slurm: a dead node or task must not take the others along.
STEP_ARGS = ("--no-kill", "--kill-on-bad-exit=0", "--wait=0", "--mpi=none", "--cpu-bind=none")
YEAR_MIN = 365 * 24 * 60


def parameters(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The flags of the Slurm job, in submitit's names; one task for each node."""
    batch = recipe.slurm
    setup = [f"export SRUN_CPUS_PER_TASK={batch.cpus_per_task}"] if batch.cpus_per_task else []
    # A requeued job would find the records of its own earlier life and take them for the present.
    more: dict[str, Any] = {"no-kill": True, "no-requeue": True, "signal": f"USR1@{drain_notice_s(recipe)}"}
    if recipe.cluster.gpu_request and recipe.engine.device == "cuda":
        flag, _, value = recipe.cluster.gpu_request.format(n=recipe.cluster.gpus_per_node).partition("=")
        more[flag] = value
    given = {
        "partition": batch.partition,
        "account": batch.account,
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
        "setup": [*setup, *batch.setup],
        "srun_args": [*STEP_ARGS, *batch.srun_args],
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own default is refused by sites that check it
        "additional_parameters": more | dict(batch.sbatch),
        **{name: value for name, value in given.items() if value is not None},
    }


def drain_notice_s(recipe: Recipe) -> int:
    """Seconds before the time limit at which Slurm sends USR1; it may come up to 60 s early."""
    return round(recipe.engine.drain_s) + 60


def script(recipe: Recipe, plan: Plan, folder: Path, python: str) -> str:
    """The batch script, to the letter, as `submit` sends it. A pure function."""
    command = f"{python} -u -m submitit.core._submit {folder}"
    return _make_sbatch_string(command=command, folder=folder, **parameters(recipe, plan))


def check(launcher: Launcher, recipe: Recipe, plan: Plan, gpus_here: int) -> None:
    """Refuse what this machine cannot do, before anything is written.

    Raises:
        SubmitError: There is no Slurm here.
        PlanError: The deployment does not fit this machine.
    """
    if launcher is Launcher.SLURM:
        for name in ("sbatch", "srun"):
            if shutil.which(name) is None:
                raise SubmitError(
                    f"launcher=slurm needs {name} on PATH and there is none: run this on a login node of the cluster, "
                    "or use launcher=local to run on this machine"
                )
        shortest = (drain_notice_s(recipe) + 60) // 60 + 1
        if recipe.slurm.time_min < shortest:
            raise SubmitError(
                f"slurm.time_min={recipe.slurm.time_min} leaves no time to serve: Slurm's notice comes up to "
                f"{drain_notice_s(recipe) + 60} s before the end; use at least {shortest}, or a smaller engine.drain_s"
            )
    elif recipe.engine.device == "cuda":
        # The agents of a machine that plays several nodes share its GPUs out: see `node_devices`.
        needed = (
            (plan.ranks - 1) * plan.slots_per_node + 1 + max(max(member.slots) for member in plan.on(plan.ranks - 1))
        )
        if needed > gpus_here:
            raise PlanError(
                f"the deployment needs {needed} GPUs on {plan.ranks} nodes and this machine has {gpus_here}: submit it "
                "with launcher=slurm, or choose smaller counts"
            )


def submit(launcher: Launcher, recipe: Recipe, plan: Plan, run_dir: Path, folder: Path) -> submitit.Job[None]:
    """Submit the agents of the plan.

    Args:
        launcher: Which executor.
        recipe: The recipe, already in the run directory.
        plan: Its plan.
        run_dir: What the agents are told.
        folder: Where submitit writes its files and the agents' logs.

    Raises:
        SubmitError: sbatch refused; brings what it said.
    """
    if launcher is Launcher.DEBUG:
        return submitit.DebugExecutor(folder).submit(task.run, str(run_dir))
    if launcher is Launcher.LOCAL:
        local = submitit.LocalExecutor(folder)
        local.update_parameters(
            tasks_per_node=plan.ranks,
            timeout_min=YEAR_MIN,  # submitit's default ends the job after two minutes
            stderr_to_stdout=True,
            gpus_per_node=plan.slots_per_node if recipe.engine.device == "cuda" else 0,
        )
        with _shielded_children(folder / "controller.out"):
            return local.submit(task.run, str(run_dir))
    executor = submitit.SlurmExecutor(folder, python=sys.executable)
    executor.update_parameters(**parameters(recipe, plan))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch says; the error below repeats it
            return executor.submit(task.run, str(run_dir))
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        raise SubmitError(f"sbatch refused the job: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What sbatch said, without submitit's own words around it."""
    text = str(error)
    lines = [line.partition("error:")[2].strip() for line in text.splitlines() if "error:" in line]
    return "\n".join(lines) or text.strip()


@contextlib.contextmanager
def _shielded_children(output: Path) -> Iterator[None]:
    """Children started in the block do not depend on the terminal: their signals and their output are their own.

    They ignore Ctrl-C and a closing terminal (an ignored signal stays ignored through exec; submitit's controller would
    give the agents one second before it kills them), and write to a file, else `wait=false` would never end a pipeline.
    """
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGHUP)}
    sys.stdout.flush()
    sys.stderr.flush()
    visible = devices_here()
    if visible:
        os.environ[VISIBLE_DEVICES] = ",".join(visible)
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with output.open("ab") as file:
        for descriptor in kept:
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        os.environ.pop(VISIBLE_DEVICES, None)
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        for signum, handler in before.items():
            signal.signal(signum, handler)
