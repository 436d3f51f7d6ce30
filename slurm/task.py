"""What submitit pickles: a function and the path of the run directory. Everything else is read on the node."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def run(run_dir: str) -> None:
    """Be the agent of this task's rank, or with the debug executor of all ranks."""
    from submitit import JobEnvironment

    from launch.plan import check_hosts, plan
    from launch.records import RunDirectory
    from slurm import agent
    from workers.runtime.logs import set_up_logging

    os.umask(0o077)  # of everything that is started here: logs, sockets and files of NATS and etcd
    directory = RunDirectory(Path(run_dir))
    recipe = directory.recipe()
    where = plan(recipe)
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    if executor not in ("slurm", "local"):  # the debug executor calls us in the launching process
        agent.main(directory, range(where.ranks), f"{recipe.name}/{os.getpid()}")
        return
    environment = JobEnvironment()
    if executor == "slurm":
        check_hosts(where, environment.hostnames, recipe.cluster)
    if executor == "local":
        # The terminal's signals are for the launching command alone; it tells the agents what they mean.
        with contextlib.suppress(PermissionError):
            os.setsid()
    set_up_logging(f"rank {environment.global_rank}")
    agent.main(directory, [environment.global_rank], f"{recipe.name}/{environment.job_id}")
