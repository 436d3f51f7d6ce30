"""Submit a deployment: write its run directory, hand it to an executor, and keep what that answered."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from launch.errors import NameTakenError
from launch.plan import Plan
from launch.recipe import Launcher, Recipe
from launch.records import Job, RunDirectory
from slurm import executors
from slurm.batch import Submission, submitted_words
from slurm.executors import Submitted


def submit(
    launcher: Launcher,
    recipe: Recipe,
    where: Plan,
    run: RunDirectory,
    words: Sequence[str],
    begin_at: float | None = None,
) -> Submitted:
    """Write the run directory and submit; the job's number goes into `job.json`.

    Args:
        launcher: What runs it.
        recipe: The recipe.
        where: Its plan.
        run: The run directory, which need not be there.
        words: What the user wrote to get the recipe.
        begin_at: When a Slurm job may begin, in seconds since the epoch; at once for None.

    Raises:
        NameTakenError: Somebody else does the same at this moment.
        SubmitError: It was refused.
    """
    attempt = run.next_attempt()
    try:
        run.prepare(recipe, where, attempt)
    except FileExistsError:
        raise NameTakenError(run.name, "it was launched at this very moment") from None
    host, now = socket.gethostname(), time.time()
    record = Job(launcher=launcher, attempt=attempt, id="", host=host, submitted_at=now)
    record.nodes, record.begin_at = where.ranks, begin_at
    run.put_job(record)
    begin_in_s = max(0, round(begin_at - now)) if begin_at is not None else 0
    asked = Submission(run_dir=run.path, attempt=attempt, overrides=submitted_words(words), begin_in_s=begin_in_s)
    job = executors.submit(launcher, recipe, where, asked)
    record.id = str(job.job_id)
    run.put_job(record)
    return job
