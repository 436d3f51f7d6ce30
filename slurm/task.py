"""A task: the process that Slurm, or submitit on this machine, starts for each rank. It becomes the rank's agent.

`python -m slurm.task RUN_DIR ATTEMPT` is what the batch script runs; `run` is what submitit pickles for the local and the debug
executor: a function and a path. Everything else is read on the node.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from slurm import signals

if TYPE_CHECKING:
    from launch.records import RunDirectory

# Seconds after which what one node wrote is seen on all of them.
SHARED_AFTER_S = 60.0


def main() -> int:
    """Be the agent of this task of a Slurm step; 0 when its part of the deployment ended well."""
    signals.hold()
    os.umask(0o077)  # as in `run`
    from launch.elastic import plan_of
    from launch.errors import LaunchError
    from launch.plan import check_hosts
    from launch.records import RunDirectory
    from slurm import agent
    from workers.runtime.logs import set_up_logging

    rank = int(os.environ.get("SLURM_PROCID", "0"))
    directory, attempt = RunDirectory(Path(sys.argv[1])), int(sys.argv[2])
    number = int(sys.argv[3]) if len(sys.argv) > 3 else None
    set_up_logging(f"rank {rank}" if number is None else f"extension {number}, rank {rank}")
    try:
        recipe = directory.recipe()
        if number is None:
            job_id = _await_own(directory, attempt, os.environ, SHARED_AFTER_S)
            where = plan_of(directory, recipe, attempt)
        else:
            job_id = os.environ.get("SLURM_JOB_ID", "")
            rank += first_rank(directory, attempt, number, job_id)
            where = plan_of(directory, recipe, attempt).part(number)
        check_hosts(where, hosts(os.environ), recipe.cluster)
        agent.main(directory, [rank], f"{recipe.name}/{job_id}")
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _await_own(directory: RunDirectory, attempt: int, environ: Mapping[str, str], timeout_s: float) -> str:
    """The number of this job, once the run directory says that the attempt is its.

    Raises:
        LaunchError: The attempt is another job's, as when a batch script is submitted twice.
    """
    import time

    from launch.errors import LaunchError
    from launch.recipe import Launcher

    own = environ.get("SLURM_JOB_ID", "")
    if "SLURM_HET_SIZE" in environ:
        raise LaunchError(f"job {own} is heterogeneous: the agents run as one step on one kind of node")
    if environ.get("SLURM_RESTART_COUNT", "0") != "0":
        raise LaunchError(
            f"job {own} was requeued, and {directory.name} has the records of its earlier life: launch again (a chain goes on by "
            "itself after a preemption, without requeueing)"
        )
    deadline = time.monotonic() + timeout_s
    while True:
        job = directory.job()
        if job is not None and job.attempt == attempt:
            if job.launcher is Launcher.ALLOCATION or job.id in ("", own):
                return own
            raise LaunchError(
                f"this batch script served job {job.id} already, and this is job {own}: print a new one with dry_run=true"
            )
        if job is not None and job.attempt > attempt:
            raise LaunchError(
                f"this batch script is of attempt {attempt} and {directory.name} is at attempt {job.attempt}: "
                "print a new one with dry_run=true"
            )
        if time.monotonic() > deadline:  # a network file system may show an older state for a while
            raise LaunchError(
                f"{directory.path} holds no job.json of attempt {attempt}: is it the same folder on all nodes?"
            )
        time.sleep(0.2)


def first_rank(
    directory: RunDirectory, attempt: int, number: int, job_id: str, timeout_s: float = SHARED_AFTER_S
) -> int:
    """The first rank of an extension, once the run directory has it.

    Raises:
        LaunchError: The deployment is not there any more, or has another attempt, or the extension is another job's.
    """
    import time

    from launch.elastic import joining
    from launch.errors import LaunchError

    deadline = time.monotonic() + timeout_s
    while (found := joining(directory, attempt, number)) is None:
        if time.monotonic() > deadline:  # a network file system may show an older state for a while
            raise LaunchError(
                f"{directory.path} has no extension {number} of attempt {attempt}: the deployment that it was to join has ended"
            )
        time.sleep(0.2)
    if job_id and found.job and found.job != job_id:
        raise LaunchError(f"extension {number} of {directory.name} is job {found.job}, and this is job {job_id}")
    return found.extension.first_rank


def run(run_dir: str, extension: int | None = None) -> None:
    """Be the agent of this task's rank, or with the debug executor of all ranks; of an extension where one is named."""
    from submitit import JobEnvironment

    from launch.plan import plan
    from launch.records import RunDirectory
    from slurm import agent
    from workers.runtime.logs import set_up_logging

    os.umask(0o077)  # of everything that is started here: logs, sockets and files of NATS and etcd
    directory = RunDirectory(Path(run_dir))
    recipe = directory.recipe()
    if os.environ.get("SUBMITIT_EXECUTOR") != "local":  # the debug executor calls us in the launching process
        agent.main(directory, range(plan(recipe).ranks), f"{recipe.name}/{os.getpid()}")
        return
    signals.hold()  # instead of submitit's handlers, which ignore SIGTERM
    environment = JobEnvironment()
    rank = environment.global_rank
    if extension is not None:
        job = directory.job()
        rank += first_rank(directory, job.attempt if job else 0, extension, "")
    # The terminal's signals are for the launching command alone; it tells the agents what they mean.
    with contextlib.suppress(PermissionError):
        os.setsid()
    set_up_logging(f"rank {rank}")
    agent.main(directory, [rank], f"{recipe.name}/{environment.job_id}")


def hosts(environ: Mapping[str, str]) -> list[str]:
    """The nodes of this step, in the order of its ranks; read without scontrol, which a container may lack."""
    from submitit.slurm.slurm import _parse_node_list

    return list(_parse_node_list(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")))


if __name__ == "__main__":
    sys.exit(main())
