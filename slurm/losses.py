"""Nodes that are lost, and the job that is asked for in place of their engines (`slurm.on_lost_node=extra_job`).

A job that was to join and has ended in the queue is lost as well: nobody waits for it any more, and one that was to replace
lost engines is asked for again.

A rank is lost when it has been silent for long *and* nothing listens any more where its members did: an agent that only
cannot write keeps its engines. What is lost leaves for good; as many new engines of the same roles join with a job of their
own, under new names. Whole engines only: of one that spanned the node, the members elsewhere leave too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from launch import elastic, watch
from launch.elastic import Departure, Following, Joining, short_of
from launch.plan import Member, Plan
from launch.recipe import Kind, Launcher, OnLostNode, Recipe, kind_of
from launch.records import Job, RankRecord, RunDirectory
from slurm.heard import Heard
from slurm.succession import outside
from workers.runtime.awake import AwakeClock

log = logging.getLogger(__name__)

POLL_S = 0.5  # not more than an AwakeClock counts at once
# Twice what makes a rank silent: a file system that hangs for a moment costs no engine.
LOST_AFTER_S = 30.0
CONNECT_S = 2.0
MOST_TRIES = 3
# Between two questions to Slurm about a job in the queue: sites throttle who asks more often.
ASK_S = 15.0
AGAIN_AFTER_S = 60.0


class Losses:
    """What the head does about lost nodes, as long as it is sure to be the head."""

    def __init__(self, run: RunDirectory, recipe: Recipe, job: Job, rank: int, sure: Callable[[], bool]) -> None:
        self._run = run
        self._recipe = recipe
        self._job = job
        self._rank = rank
        self._sure = sure
        self._following = Following(run, recipe, job.attempt)
        self._clock = AwakeClock()
        self._heard = Heard(LOST_AFTER_S)
        self._tries = 0

    async def watch(self) -> None:
        """Replace what is lost, and give up what never joins; for ever."""
        if self._job.launcher is not Launcher.SLURM:
            await asyncio.get_running_loop().create_future()  # nothing is: others end this
        async with asyncio.TaskGroup() as group:
            group.create_task(self._give_up_ended_jobs(), name="ended jobs")
            if self._recipe.slurm.on_lost_node is not OnLostNode.SHRINK:
                group.create_task(self._replace_lost(), name="lost nodes")

    async def _give_up_ended_jobs(self) -> None:
        attempt = self._job.attempt
        while True:
            await asyncio.sleep(ASK_S)
            if not self._sure():
                continue
            with contextlib.suppress(OSError):  # the shared file system has a bad moment: look again
                where, joined = self._following.look(), elastic.joinings(self._run, attempt)
                for each in elastic.not_begun(where, joined, self._following.gone, self._run.ranks(attempt)):
                    state, _ = await asyncio.to_thread(watch.slurm_state, each.job)
                    if state in watch.ENDED_SLURM_STATES:
                        log.warning("job %s ended before it joined (%s)", each.job, state or "unknown")
                        elastic.give_up(self._run, attempt, each, state)

    async def _replace_lost(self) -> None:
        tried_at = -AGAIN_AFTER_S
        while True:
            await asyncio.sleep(POLL_S)
            if not self._sure():
                continue
            with contextlib.suppress(OSError):  # the shared file system has a bad moment: look again
                await self._note_lost()
                missing = self._missing()
                if missing and self._tries < MOST_TRIES and self._clock.now - tried_at > AGAIN_AFTER_S:
                    tried_at = self._clock.now
                    self._tries += 1
                    await self._replace(missing)

    async def _note_lost(self) -> None:
        self._clock.tick()
        where, ranks = self._following.look(), self._run.ranks(self._job.attempt)
        self._heard.look(ranks)
        for rank, record in ranks.items():
            members = where.on(rank)
            if rank == self._rank or record.ended or not members or not self._heard.silent(rank):
                continue
            if any([await _listens(record, member) for member in members]):
                continue
            reason = f"rank {rank} on {record.host} is lost"
            log.error("%s: without %s from now on", reason, ", ".join(member.name for member in members))
            for member in members:
                elastic.leave(self._run, self._job.attempt, member.engine, reason, lost=True)

    def _missing(self) -> list[str]:
        endpoint = self._run.endpoint()
        if endpoint is None or not endpoint.state.serves:
            return []
        where = self._following.look()
        return to_replace(where, list(self._following.gone.values()), self._following.joined)

    async def _replace(self, engines: Sequence[str]) -> None:
        counts = Counter(engine.rpartition("-")[0] for engine in engines)
        words = [f"{role}=+{count}" for role, count in counts.items()]
        log.info("asking for a job in place of %s (%d of %d tries)", ", ".join(engines), self._tries, MOST_TRIES)
        command = [sys.executable, "-m", "launch.scale", self._run.path.name, *words, "--no-wait"]
        command += ["--runs-dir", str(self._run.path.parent), "--in-place-of", *engines]
        process = await asyncio.create_subprocess_exec(
            *command,
            env=outside(os.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        text = said.decode(errors="replace").strip()
        if process.returncode == 0:
            log.info("%s", text)
            elastic.put_trouble(self._run, self._job.attempt, "")
            return
        trouble = (
            f"no job could be submitted in place of {', '.join(engines)} (try {self._tries} of {MOST_TRIES}): {text}"
        )
        log.error("%s", trouble)
        elastic.put_trouble(self._run, self._job.attempt, trouble)


def to_replace(where: Plan, gone: Sequence[Departure], joined: Sequence[Joining]) -> list[str]:
    """The lost engines in whose place none is there or on its way. Pure."""
    alive = {member.engine for member in where.members}  # with those whose job still waits
    return [each.engine for each in short_of(gone, joined, alive) if _is_engine(each.engine)]


def _is_engine(name: str) -> bool:
    return kind_of(name) in list(Kind)


async def _listens(record: RankRecord, member: Member) -> bool:
    """Whether somebody answers at a member's metrics port."""
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(record.address, record.port_base + member.ports.metrics)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
