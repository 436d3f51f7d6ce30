"""Submission: the same agents as a Slurm job or a step of the one we are in, as processes of this machine, or inside this
process."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launch.errors import PlanError, SubmitError
from launch.plan import Plan
from launch.recipe import Launcher, Recipe
from slurm import batch, task
from slurm.batch import Submission
from slurm.environments import interpreter
from slurm.hosts import VISIBLE_DEVICES, devices_here

YEAR_MIN = 365 * 24 * 60
SBATCH_S = 45
FULL = "temporarily unable to accept job"


class Submitted(Protocol):
    """What was started: its number, and whether it has ended."""

    @property
    def job_id(self) -> str:
        """Slurm's number of the job, or the process that stands for it."""
        ...

    def done(self) -> bool:
        """Whether it has ended, as far as is known here."""
        ...


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's own, sending our script to the letter, and waiting `SBATCH_S` for sbatch at most.

    sbatch itself goes on asking a controller with a full queue for two minutes, and says so nowhere.
    """

    def __init__(self, folder: Path, text: str, begin_in_s: int = 0) -> None:
        super().__init__(folder)
        self._text = text
        self._flags = (f"--begin=now+{begin_in_s}",) if begin_in_s else ()

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["timeout", str(SBATCH_S), "sbatch", *self._flags, str(submission_file_path)]

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text


class Step:
    """Agents that run as one step of the allocation we are in, behind an srun of ours."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def job_id(self) -> str:
        """The process of srun."""
        return str(self._process.pid)

    def done(self) -> bool:
        """Whether srun has ended."""
        return self._process.poll() is not None


def check(launcher: Launcher, recipe: Recipe, plan: Plan, gpus_here: int) -> None:
    """Refuse what this machine cannot do, before anything is written.

    Raises:
        SubmitError: There is no Slurm here.
        PlanError: The deployment does not fit this machine.
    """
    if recipe.environment.kind != "here" and launcher in (Launcher.LOCAL, Launcher.DEBUG):
        raise SubmitError(
            f"environment.kind={recipe.environment.kind} is for jobs: launcher={launcher} runs in the Python that launches; "
            "use launcher=slurm or allocation, or environment.kind=here"
        )
    if launcher is Launcher.SLURM:
        for name in ("sbatch", "srun"):
            if shutil.which(name) is None:
                raise SubmitError(
                    f"launcher=slurm needs {name} on PATH and there is none: run this on a login node of the cluster, "
                    "or use launcher=local to run on this machine"
                )
        batch.refuse(recipe, plan, os.environ)
    elif launcher is Launcher.ALLOCATION:
        _refuse_allocation(plan, os.environ)
    elif recipe.engine.device == "cuda":
        # The agents of a machine that plays several nodes share its GPUs out: see `node_devices`.
        needed = (
            (plan.ranks - 1) * plan.slots_per_node + 1 + max(max(member.slots) for member in plan.on(plan.ranks - 1))
        )
        nodes = f" on {plan.ranks} nodes" if plan.ranks > 1 else ""
        if needed > gpus_here:
            raise PlanError(
                f"the deployment needs {needed} GPUs{nodes} and this machine has {gpus_here}: submit it with "
                "launcher=slurm, or choose smaller counts"
            )


def _refuse_allocation(plan: Plan, environ: Mapping[str, str]) -> None:
    """Refuse to start a step where there is no allocation for it."""
    if "SLURM_HET_SIZE" in environ:
        raise SubmitError(f"job {environ.get('SLURM_JOB_ID')} is heterogeneous: {batch.REFUSED['hetjob']}")
    if shutil.which("srun") is None or "SLURM_JOB_ID" not in environ:
        raise SubmitError(
            f"launcher=allocation runs inside a job and this is none: `salloc --nodes={plan.ranks} ...` first, "
            "or submit one with launcher=slurm"
        )
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", environ.get("SLURM_NNODES", "1")))
    if nodes < plan.ranks:
        raise SubmitError(
            f"the deployment needs {plan.ranks} nodes and job {environ['SLURM_JOB_ID']} has {nodes}: "
            f"`salloc --nodes={plan.ranks} ...`, or choose smaller counts"
        )


def submit(launcher: Launcher, recipe: Recipe, plan: Plan, asked: Submission) -> Submitted | submitit.Job[None]:
    """Submit the agents of the plan.

    Args:
        launcher: Which executor.
        recipe: The recipe, already in the run directory.
        plan: Its plan.
        asked: Where the run directory is, and the attempt.

    Raises:
        SubmitError: sbatch refused; brings what it said.
    """
    folder, run_dir = asked.folder, asked.run_dir
    if launcher is Launcher.DEBUG:
        return submitit.DebugExecutor(folder).submit(task.run, str(run_dir), asked.extension)
    if launcher is Launcher.LOCAL:
        local = submitit.LocalExecutor(folder)
        local.update_parameters(
            tasks_per_node=plan.ranks,
            timeout_min=YEAR_MIN,  # submitit's default ends the job after two minutes
            stderr_to_stdout=True,
            gpus_per_node=plan.slots_per_node if recipe.engine.device == "cuda" else 0,
        )
        with _shielded_children(folder / "controller.out"):
            return local.submit(task.run, str(run_dir), asked.extension)
    if launcher is Launcher.ALLOCATION:
        return _step(recipe, plan, asked)
    executor = SlurmExecutor(folder, batch.script(recipe, plan, asked), asked.begin_in_s)
    executor.update_parameters(**batch.parameters(recipe, plan, asked))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what sbatch says; the error below repeats it
            return executor.submit(task.run, str(run_dir), asked.extension)
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        raise SubmitError(f"sbatch refused the job: {_said(error)}") from error


def _step(recipe: Recipe, plan: Plan, asked: Submission) -> Step:
    """Start the agents as one step of the allocation that we are in, through the same shell lines as in a batch script."""
    srun = [
        *("srun", "--unbuffered", f"--nodes={plan.ranks}", f"--ntasks={plan.ranks}", "--ntasks-per-node=1"),
        f"--output={asked.folder}/%j_%t_log.out",
        *batch.step_args(recipe, asked.run_dir),
    ]
    python = interpreter(recipe, asked.run_dir)
    lines = [*batch.exports(recipe), *python.setup, *recipe.cluster.setup, *recipe.slurm.setup]
    lines.append(f"exec {shlex.join(srun)} {batch.task_command(recipe, asked)}")
    # An allocation's flags for CPUs are those of its own shell; the agents take whole nodes, whatever it was given.
    inherited = {name: value for name, value in os.environ.items() if name not in ("SLURM_CPUS_PER_TASK",)}
    with (asked.folder / "srun.out").open("ab") as output:
        process = subprocess.Popen(
            ["bash", "-c", "\n".join(lines)],
            env=inherited | {"SUBMITIT_EXECUTOR": "slurm", "SLURM_EXPORT_ENV": "ALL"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # the terminal's Ctrl-C is for the launching command, which tells the agents
        )
    return Step(process)


def _said(error: Exception) -> str:
    """What sbatch said, without submitit's own words around it."""
    text = str(error)
    lines = [line.partition("error:")[2].strip() for line in text.splitlines() if "error:" in line]
    if any(FULL in line for line in lines):
        return (
            f"Slurm's queue is full, for {SBATCH_S} s it said {lines[0]!r}: submit again later, or cancel jobs of yours that wait "
            "(squeue --me)"
        )
    return "\n".join(dict.fromkeys(lines)) or text.strip()


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
