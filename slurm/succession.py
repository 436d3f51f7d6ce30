"""The life of one attempt, kept by rank 0: what `launch.history` tells of it, and, where it is a link of a chain, its place there.

A link publishes its endpoint as the chain's once it is ready, has the next link submitted in time, goes on admitting for a grace
period when that one serves, and then drains. What is to be done `launch.chain` decides; the submission is a process of its own
(`launch.handover`), so that nothing of it can hold up or bring down the agent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

from launch.chain import (
    Chain,
    ChainRecord,
    Ending,
    Trouble,
    begins_at,
    chain_of,
    ending,
    goes_on,
    goes_on_after,
    to_publish,
)
from launch.recipe import Launcher, Recipe
from launch.records import Endpoint, Job, Life, Phase, RunDirectory
from slurm import limit
from slurm.batch import EARLY_S, notice_s

log = logging.getLogger(__name__)

POLL_S = 0.5
AGAIN_S = 60.0
LATE_S = 60.0
SUBMIT_S = 150.0
ASK_S = 10.0
# What a job sets for its own processes: one submitted from inside would take it for its own. SBATCH_ACCOUNT and the like are
# the user's, and stay.
OF_A_JOB = (
    *("SLURM_", "SLURMD_", "SRUN_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND", "SUBMITIT_", "PMI_", "PMIX_"),
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
)
KEPT = ("SLURM_CONF", "SLURM_JWT")


class Succession:
    """Keeps one attempt's life, and its place in a chain, from the agent's start until it is cancelled.

    Args:
        run: The run directory.
        recipe: Its recipe.
        job: The attempt.
        stop: Set when the deployment is asked to end; set here when another link has replaced it.
        life: What is known of the attempt: when its process began, and what an earlier head has seen.
        leads: Whether this rank is still the head that it was; one that is deposed has no last words.
    """

    def __init__(
        self, run: RunDirectory, recipe: Recipe, job: Job, stop: asyncio.Event, life: Life, leads: Callable[[], bool]
    ) -> None:
        self._run = run
        self._recipe = recipe
        self._job = job
        self._stop = stop
        self._leads = leads
        self._life = Life(
            started_at=life.started_at, ready_at=life.ready_at
        )  # what an earlier head took for the end was none
        self._place = chain_of(run)
        self._replaced_at: float | None = None
        self._dated = False
        self._ending: Ending | None = None
        self._begins_at: float | None = None
        self._submission: asyncio.Task[None] | None = None
        self._next_try = 0.0
        self._tried_for: Ending | None = None
        self._troubled = False

    async def keep(self) -> None:
        """Follow it; for ever. When cancelled it says how the attempt ended, and leaves no link unsubmitted that has to come."""
        self._save()
        try:
            while True:
                try:
                    await self._look()
                    self._troubled = False
                except OSError as error:
                    if not self._troubled:
                        log.warning("the chain's folder cannot be read or written (%s); looking again", error)
                    self._troubled = True
                await asyncio.sleep(POLL_S)
        finally:
            if self._leads():
                await self._end()
            elif self._submission:
                self._submission.cancel()  # its process finishes by itself, and the new head finds what it did

    async def _look(self) -> None:
        endpoint = self._run.endpoint()
        if endpoint and endpoint.state.serves and self._life.ready_at is None:
            self._life.ready_at = time.time()
            self._save()
        if self._place:
            self._follow_chain(self._place[0], self._place[1], endpoint)
        if self._stop.is_set() and self._ending is None:
            self._ending = await self._why()
            log.info("this deployment ends: %s", self._ending)
        if self._place:
            self._succeed_in_time(self._place[0], self._place[1], endpoint)

    def _follow_chain(self, chain: Chain, number: int, endpoint: Endpoint | None) -> None:
        """Publish, or find that another link has; end when the chain does, or is with the other link for long enough."""
        published = chain.endpoint()
        if endpoint:
            told = to_publish(endpoint, number, published)
            if told:
                if published is None or published.link != number:
                    log.info("link %d serves the chain from now on", number)
                chain.put_endpoint(told)
        record = chain.record()
        self._dated = bool(record and record.until is not None and time.time() >= record.until)
        if published and published.link > number and published.state is not Phase.STARTING:
            if self._replaced_at is None:
                log.info("link %d serves; requests are admitted here for another %.0f s", published.link, self._grace_s)
                self._replaced_at = time.monotonic()
            elif time.monotonic() - self._replaced_at >= self._grace_s and not self._stop.is_set():
                self._run.put_moved(published.url)
                self._stop.set()
        if (self._dated or chain.stop_file.exists()) and not self._stop.is_set():
            self._stop.set()

    @property
    def _grace_s(self) -> float:
        return self._recipe.handover.grace_s

    async def _why(self) -> Ending:
        """Why this attempt ends."""
        asked = self._run.stop_file.exists() or bool(self._place and self._place[0].stop_file.exists())
        replaced, stopping = self._replaced_at is not None, self._stop.is_set()
        job: Mapping[str, str] = {}
        latest: float | None = None
        if not (asked or replaced or self._dated) and self._job.launcher is Launcher.SLURM:
            job = await asyncio.to_thread(describe_job, os.environ.get("SLURM_JOB_ID", ""))
            ends = await asyncio.to_thread(limit.ends_at, self._job.launcher, os.environ)
            latest = None if ends is None else ends - notice_s(self._recipe) - EARLY_S
        return ending(
            asked=asked,
            replaced=replaced,
            dated=self._dated,
            stopping=stopping,
            job=job,
            ends_at=latest,
            now=time.time(),
        )

    # --- the next link ----------------------------------------------------------------------------------------------

    def _succeed_in_time(self, chain: Chain, number: int, endpoint: Endpoint | None) -> None:
        """Have the next link submitted: when this one is ready, or ends early."""
        record = chain.record()
        if record is None or not self._wants_next(chain, record, number, endpoint):
            return
        if self._next_try > time.monotonic() and self._ending is self._tried_for:
            return  # it was refused a while ago; that this link ends is a reason to ask again at once
        self._next_try, self._tried_for = time.monotonic() + AGAIN_S, self._ending
        self._begins_at = self._when(endpoint)
        self._submission = asyncio.create_task(self._submit(chain, number), name="next link")

    def _wants_next(self, chain: Chain, record: ChainRecord, number: int, endpoint: Endpoint | None) -> bool:
        if self._submission and not self._submission.done():
            return False
        if chain.stop_file.exists() or self._replaced_at is not None:
            return False
        newest = max(chain.numbers(), default=0)
        if newest > number and self._ending is None:
            # It should be there by now: if it ended before it served, another has to come.
            job = chain.link(newest).job()
            if job is None or time.time() < max(job.submitted_at, job.begin_at or 0.0) + LATE_S:
                return False
        ready = self._life.ready_at is not None
        if self._ending is not None:
            if not goes_on_after(self._ending, ready):
                return False
        elif not ready or endpoint is None or endpoint.expires_at is None:
            return False  # without an end nobody has to follow, unless a person says so
        ends_at = None if self._ending is not None or endpoint is None else endpoint.expires_at
        return goes_on(record.length, number - record.first + 1, ends_at, time.time())

    def _when(self, endpoint: Endpoint | None) -> float | None:
        """When the next link's job may begin; None for at once."""
        if self._ending is not None or endpoint is None or endpoint.expires_at is None or self._life.ready_at is None:
            return None
        load_s = self._life.ready_at - self._life.started_at
        waited_s = max(0.0, self._life.started_at - max(self._job.submitted_at, self._job.begin_at or 0.0))
        return begins_at(
            endpoint.expires_at,
            notice_s(self._recipe),
            self._recipe.handover,
            load_s,
            waited_s,
            self._recipe.slurm.time_min,
        )

    async def _submit(self, chain: Chain, number: int) -> None:
        """Submit, in a process of its own; what is refused is told in the chain's folder and tried again later."""
        argv = command(chain, number, self._begins_at)

        def submit() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                argv, env=outside(os.environ), capture_output=True, text=True, check=False, timeout=SUBMIT_S
            )

        try:
            done = await asyncio.to_thread(submit)
        except subprocess.TimeoutExpired:
            message = f"{' '.join(argv)} has not ended after {SUBMIT_S:.0f} s"
        else:
            if done.returncode == 0:
                log.info("%s", done.stdout.strip())
                return
            message = done.stderr.strip()[-2000:].removeprefix("error: ")
        log.warning("link %d could not be submitted, next try in %.0f s: %s", number + 1, AGAIN_S, message)
        try:
            trouble = Trouble(link=number + 1, message=message, at=time.time(), begin_at=self._begins_at)
            chain.put_trouble(trouble)
        except OSError as error:
            log.warning("the chain's folder cannot be written: %s", error)

    async def _end(self) -> None:
        """The last words: why, and the link that has to follow where none was submitted."""
        try:
            if self._ending is None:
                self._ending = await self._why()
            self._life.ended_at, self._life.how = time.time(), str(self._ending)
            self._save()
            if not self._place:
                return
            chain, number = self._place
            self._succeed_in_time(chain, number, self._run.endpoint())
            if self._submission:
                await asyncio.wait([self._submission])
            published = chain.endpoint()
            if published and published.link == number:
                published.state = Phase.STOPPED
                chain.put_endpoint(published)
        except OSError as error:
            log.warning("the end of this attempt could not be written: %s", error)

    def _save(self) -> None:
        try:
            self._run.put_life(self._job.attempt, self._life)
        except OSError as error:
            log.warning("life.json cannot be written: %s", error)


def command(chain: Chain, after: int, begin_at: float | None) -> list[str]:
    """The command line that submits the next link, unless one after link `after` waits or runs.

    At once for a `begin_at` of None; one that waits for its time then begins at once as well.
    """
    argv = [sys.executable, "-m", "launch.handover", chain.name, "--runs-dir", str(chain.path.parent)]
    argv += [f"--after={after}"]
    return argv if begin_at is None else [*argv, f"--begin-at={begin_at:.3f}"]


def outside(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what belongs to the job that we are in."""
    return {name: value for name, value in environ.items() if name in KEPT or not name.startswith(OF_A_JOB)}


def describe_job(job_id: str) -> dict[str, str]:
    """What `scontrol show job` says, by key; empty where it says nothing. Blocks for up to `ASK_S`."""
    if not job_id or shutil.which("scontrol") is None:
        return {}
    argv = ["scontrol", "show", "job", "--oneliner", job_id]
    try:
        answer = subprocess.run(argv, capture_output=True, text=True, timeout=ASK_S, check=False)
    except subprocess.TimeoutExpired:
        return {}
    if answer.returncode:
        return {}
    pairs = (word.partition("=") for word in answer.stdout.split())
    return {key: value for key, mark, value in pairs if mark}
