"""`python -m launch.prepare RUN_DIR ATTEMPT < WORDS`: what a batch script does first when a person submitted it.

The words are those of `python -m launch`, one a line: on standard input, because command lines can be read by everybody.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

from launch import chains
from launch.compose import read
from launch.errors import LaunchError
from launch.plan import plan
from launch.recipe import Launcher
from launch.records import Job, RunDirectory


def main() -> int:
    """Prepare the run directory for this job; 0 when it is ready, 1 with a message when not."""
    words = [line for line in sys.stdin.read().splitlines() if line]
    try:
        prepare(RunDirectory(Path(sys.argv[1])), int(sys.argv[2]), words, os.environ.get("SLURM_JOB_ID", ""))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(run: RunDirectory, attempt: int, words: list[str], job_id: str) -> None:
    """Write what `python -m launch` writes before it submits.

    Raises:
        LaunchError: The deployment runs elsewhere, or the words make no recipe.
    """
    chains.refuse_taken(run)
    recipe = read(words).recipe
    begun = run.next_attempt()
    if begun != attempt:
        raise LaunchError(
            f"this batch script is of attempt {attempt} and {run.name} is at attempt {begun}: print a new one with dry_run=true"
        )
    run.prepare(recipe, plan(recipe), attempt)
    host = socket.gethostname()
    run.put_job(Job(launcher=Launcher.SLURM, attempt=attempt, id=job_id, host=host, submitted_at=time.time()))


if __name__ == "__main__":
    sys.exit(main())
