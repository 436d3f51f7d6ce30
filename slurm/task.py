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

    environment = JobEnvironment()
    directory = RunDirectory(Path(run_dir))
    recipe = directory.recipe()
    where = plan(recipe)
    executor = os.environ.get("SUBMITIT_EXECUTOR", "debug")
    if executor == "slurm":
        check_hosts(where, environment.hostnames, recipe.cluster)
    if executor == "local":
        # The terminal's signals are for the launching command alone; it tells the agents what they mean.
        with contextlib.suppress(PermissionError):
            os.setsid()
    ranks = [environment.global_rank] if executor in ("slurm", "local") else list(range(where.ranks))
    if executor in ("slurm", "local"):
        set_up_logging(f"rank {environment.global_rank}")
    agent.main(directory, ranks, f"{recipe.name}/{environment.job_id}")
