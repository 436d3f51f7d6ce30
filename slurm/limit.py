"""The time limit: when Slurm will end the job, and when that means to stop admitting requests."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime

from launch.recipe import Launcher

ASK_S = 10.0
# When the time limit ends the job, in seconds since the epoch; frontends are told and tell it at /health.
ENDS_AT = "BATON_ENDS_AT"


def ends_at(launcher: Launcher, environ: Mapping[str, str]) -> float | None:
    """When Slurm ends this job, in seconds since the epoch; None without a limit, or where nobody says.

    squeue is asked first, because a limit can be changed while the job runs; what Slurm put into the environment is the
    second best, and absent in Slurm 22.05. Blocks for up to `ASK_S`.
    """
    if launcher not in (Launcher.SLURM, Launcher.ALLOCATION):
        return None
    asked = _ask(environ.get("SLURM_JOB_ID", ""))
    given = environ.get("SLURM_JOB_END_TIME")
    return asked if asked is not None else float(given) if given else None


def parsed(text: str) -> float | None:
    """The end of a job as squeue writes it (`%e`, local time), or None where it knows none."""
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        return None  # N/A, NONE, or nothing at all


def _ask(job_id: str) -> float | None:
    if not job_id or shutil.which("squeue") is None:  # a container may lack Slurm's commands
        return None
    command = ["squeue", "--noheader", "--jobs", job_id, "--format=%e"]
    # A user's own time format would not be a date.
    environ = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False, env=environ)
    except subprocess.TimeoutExpired:
        return None
    return parsed(answer.stdout) if answer.returncode == 0 else None


def seconds_left(end: float | None, notice_s: float) -> float:
    """Seconds until requests are no longer admitted, given that everything needs `notice_s` to finish; 0 when unknown."""
    return 0.0 if end is None else max(0.0, end - notice_s - time.time())


def told(environ: Mapping[str, str]) -> int | None:
    """Seconds until the time limit, for a process that was told of it; None without a limit."""
    end = environ.get(ENDS_AT)
    return max(0, round(float(end) - time.time())) if end else None
