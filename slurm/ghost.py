"""The end of a job whose node died: Slurm does not see it when the tasks that are left end.

With its batch host dead, a job that outlived it (`--no-kill`) keeps a batch step that nobody ends, and would hold its nodes
until the time limit (seen in Slurm 22.05). So the last agent cancels the job. Only one that is ours: an allocation is its
owner's to end, and a job that joined this deployment is not the one whose ranks died.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence

from launch.recipe import Launcher
from launch.records import SILENT_AFTER_S, Job, RankRecord, RunDirectory
from slurm.heard import Heard

log = logging.getLogger(__name__)

POLL_S = 0.5
SCANCEL_S = 30.0


async def end(run: RunDirectory, job: Job, lost: Sequence[int], environ: Mapping[str, str]) -> None:
    """Cancel the job if ranks of it are lost and all others have ended, this one included.

    Waits, if ranks are lost, until it is known of the others whether they live: the one that lives ends later, and does this.
    """
    if job.launcher is not Launcher.SLURM or not lost or environ.get("SLURM_JOB_ID") != job.id:
        return
    heard, gone = Heard(), set(lost)
    first: dict[int, float] = {}
    deadline = time.monotonic() + SILENT_AFTER_S + 5
    while True:
        ranks = run.ranks(job.attempt)
        heard.look(ranks)
        left = [
            record for rank, record in ranks.items() if not record.ended and rank not in {*gone, *heard.lost(ranks)}
        ]
        if not left:
            break
        if any(_alive(record, first) for record in left) or time.monotonic() > deadline:
            return
        await asyncio.sleep(POLL_S)
    if shutil.which("scancel") is None:
        log.warning(
            "job %s holds its nodes until its time limit: there is no scancel here; run `scancel %s`", job.id, job.id
        )
        return
    log.info("ranks %s are lost and all others have ended: cancelling job %s", sorted(gone), job.id)
    command = ["scancel", job.id]
    await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=SCANCEL_S, check=False)


def _alive(record: RankRecord, first: dict[int, float]) -> bool:
    """Whether a rank has written since we first looked."""
    return first.setdefault(record.rank, record.heartbeat) != record.heartbeat
