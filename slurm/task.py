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
    from launch.errors import LaunchError
    from launch.plan import check_hosts, plan
    from launch.records import RunDirectory
    from slurm import agent
    from workers.runtime.logs import set_up_logging

    rank = int(os.environ.get("SLURM_PROCID", "0"))
    set_up_logging(f"rank {rank}")
    try:
        directory = RunDirectory(Path(sys.argv[1]))
        job_id = _await_own(directory, int(sys.argv[2]), os.environ, SHARED_AFTER_S)
        recipe = directory.recipe()
        check_hosts(plan(recipe), hosts(os.environ), recipe.cluster)
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


def run(run_dir: str) -> None:
    """Be the agent of this task's rank, or with the debug executor of all ranks."""
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
    # The terminal's signals are for the launching command alone; it tells the agents what they mean.
    with contextlib.suppress(PermissionError):
        os.setsid()
    set_up_logging(f"rank {environment.global_rank}")
    agent.main(directory, [environment.global_rank], f"{recipe.name}/{environment.job_id}")


def hosts(environ: Mapping[str, str]) -> list[str]:
    """The nodes of this step, in the order of its ranks; read without scontrol, which a container may lack."""
    from submitit.slurm.slurm import _parse_node_list

    return list(_parse_node_list(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")))


if __name__ == "__main__":
    sys.exit(main())
