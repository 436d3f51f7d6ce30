"""The agent: one for each rank. It claims the rank's ports, starts the members that the plan gives it, keeps them running,
tells the run directory how they are, and ends them in order.

The agents of ranks that may lead (`launch.standby`) also run the control plane and frontends; the one that does lead, the
head (`slurm.head`), publishes the state of the whole deployment. All others follow it.

Ending, in order: frontends stop admitting and finish what runs; then engines withdraw and stop, on all ranks; then, when
nothing is left of them, the control plane; the head is the last to go.

What it does is in the modules of its parts: `slurm.examination` and `slurm.staging` before anything starts, `slurm.engines`
and `slurm.frontends` for the members, `slurm.leading` for the head, `slurm.others` for what other ranks say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Sequence

from launch.elastic import Following
from launch.errors import DeploymentError, LaunchError
from launch.plan import Plan
from launch.recipe import Recipe
from launch.records import Job, RunDirectory, State
from slurm import children, extension, fabric, ghost, hosts, ports, stops
from slurm.engines import LEADER_GRACE_S, Engines, devices
from slurm.examination import Examination
from slurm.extension import Departures
from slurm.frontends import Frontends
from slurm.leading import Leading
from slurm.others import Others
from slurm.rank import Rank
from slurm.record import OwnRecord
from slurm.staging import Staging
from slurm.supervisor import Supervisor

log = logging.getLogger(__name__)


def main(run: RunDirectory, ranks: Sequence[int], job_key: str) -> None:
    """Be the agent of these ranks until the deployment ends.

    Args:
        run: The run directory.
        ranks: The ranks that this process embodies: one, or with the debug launcher all of them.
        job_key: What tells this attempt from other deployments on the machine; ports derive from it.

    Raises:
        DeploymentError: A member failed; everything of these ranks has ended.
    """
    asyncio.run(_serve(run, ranks, job_key))


async def _serve(run: RunDirectory, ranks: Sequence[int], job_key: str) -> None:
    stop, notice = asyncio.Event(), asyncio.Event()
    agents: list[Agent] = []

    def end_now() -> None:
        for agent in agents:
            agent.kill()

    def leads() -> bool:
        return any(agent.leads for agent in agents)

    stops.listen(stop, notice, end_now)
    children.become_subreaper()
    recipe, job = run.recipe(), run.job()
    if job is None:
        raise LaunchError(f"{run.path} has no job.json: launch with `python -m launch`")
    where = Following(run, recipe, job.attempt).look()
    agents.extend(Agent(run, recipe, where, job, rank, stop) for rank in ranks)
    joined = where.span(ranks[0]) is not None
    watch = asyncio.create_task(
        extension.leave_before_the_limit(run, recipe, job, where, ranks[0], notice)
        if joined
        else stops.before_the_limit(recipe, job, leads, notice, stop),
        name="limit",
    )
    results = await asyncio.gather(*(agent.run(job_key) for agent in agents), return_exceptions=True)
    watch.cancel()
    await ghost.end(run, job, [rank for rank in agents[0].lost if rank < where.ranks], os.environ)
    for result in results:
        if isinstance(result, BaseException):
            raise result


class Agent:
    """The agent of one rank."""

    def __init__(
        self, run: RunDirectory, recipe: Recipe, where: Plan, job: Job, rank: int, stop: asyncio.Event
    ) -> None:
        me = self._rank = Rank(run=run, recipe=recipe, plan=where, job=job, number=rank, stop=stop)
        self._record = OwnRecord(me)
        self._others = Others(me)
        self._supervisor = Supervisor(me, self._record)
        self._leading = Leading(me, self._record, self._others, self._supervisor)
        self._frontends = Frontends(me, self._others, self._supervisor)
        self._following = Following(run, recipe, job.attempt)
        self._departures = Departures(
            self._following,
            rank,
            self._others.has_ended,
            me.wait_for,
            grace_s=recipe.engine.drain_s + LEADER_GRACE_S,
        )
        said = self._record.said
        self._examination = Examination(
            run, recipe, where, job.launcher, said, devices(me), me.wait_for, stop, self._others.is_head
        )
        self._staging = Staging(run, recipe, where, said, os.environ, me.wait_for, stop, self._tell_staging)
        self._engines = Engines(
            me,
            self._record,
            self._others,
            self._supervisor,
            self._examination,
            self._staging,
            self._departures,
        )

    @property
    def leads(self) -> bool:
        """Whether this rank is the head."""
        return self._others.led_from_here

    @property
    def lost(self) -> list[int]:
        """Ranks that ended without a word, as far as is known."""
        return self._others.lost

    def kill(self) -> None:
        """End every child at once."""
        self._supervisor.kill()

    async def run(self, job_key: str) -> None:
        """Be the agent until the deployment ends.

        Raises:
            LaunchError: Something of this rank failed; its record says what.
        """
        try:
            await self._run_rank(job_key)
        except BaseException as error:
            self._record.said.failure = str(_innermost(error)) or type(_innermost(error)).__name__
            log.error("rank %d: %s", self._rank.number, _innermost(error))
            self._departures.give_up(self._rank.run, self._rank.attempt, self._record.said.failure)
            raise
        finally:
            self._record.said.ended = True
            self._record.save()

    async def _run_rank(self, job_key: str) -> None:
        with ports.claim(job_key, self._rank.number) as block, contextlib.closing(self._examination):
            self._examination.snapshot = await asyncio.to_thread(fabric.read, hosts.interfaces())
            self._record.said.address = fabric.own_address(self._examination.snapshot, self._rank.recipe.cluster)
            self._record.said.port_base = block.base
            await self._examination.listen()
            for member in self._rank.plan.on(self._rank.number):
                self._record.note(member.name, State.STARTING)
            self._record.save()
            try:
                await (self._only_preflight() if self._rank.recipe.preflight.only else self._serve())
            except* (LaunchError, OSError) as errors:
                raise _innermost(errors) from None

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(self._record.heartbeat(), name="heartbeat"),
                group.create_task(self._examination.examine(), name="preflight"),
                group.create_task(self._examination.offer(), name="offer"),
                group.create_task(self._examination.answer_joiners(self._following), name="joiners"),
                group.create_task(self._others.follow_head(), name="head"),
            ]
            if self._may_lead:
                async with self._leading.control_plane(group) as headship:
                    lead = group.create_task(self._leading.lead(headship), name="lead")
                    if headship.leads:
                        await self._leading.published.wait()
                    await self._members(group)
                    lead.cancel()
                    await asyncio.wait([lead])  # its last word
            else:
                await self._members(group)
            for task in background:
                task.cancel()

    @property
    def _may_lead(self) -> bool:
        return self._rank.number in self._others.control

    async def _members(self, group: asyncio.TaskGroup) -> None:
        """Frontends (of ranks that may lead) and engine members, from their start to their end.

        Raises:
            DeploymentError: What they need of this node or of another rank was not there in time.
        """
        await self._start_members(group)
        await self._rank.stop.wait()
        self._frontends.end_spare()
        self._departures.end(self._rank.run, self._rank.attempt)
        self._engines.expect_end()
        await self._frontends.stop()
        self._record.said.drained = True
        self._record.save()
        if not self._departures.joined or self._rank.run.stop_file.exists():
            await self._rank.wait_for(self._others.frontends_drained, self._rank.recipe.engine.drain_s + 5)
        await self._engines.stop()
        self._record.said.quiet = True
        self._record.save()

    async def _start_members(self, group: asyncio.TaskGroup) -> None:
        await self._others.wait_for_control()
        recipe = self._rank.recipe
        limit_s = recipe.engine.ready_timeout_s + 2 * recipe.preflight.timeout_s
        if not await self._rank.wait_for(self._examination.sound.is_set, limit_s, unless_stopped=True):
            raise DeploymentError(f"the preflight of rank {self._rank.number} did not end: see its log")
        if not self._examination.left_out:
            await self._staging.run()
        if self._may_lead:
            self._frontends.start(group)
        await self._engines.start(group)

    async def _only_preflight(self) -> None:
        """Test, tell, and end."""
        async with asyncio.TaskGroup() as group:
            heartbeat = group.create_task(self._record.heartbeat(), name="heartbeat")
            watch = group.create_task(self._watch_stop_file(), name="stop file")
            group.create_task(self._examination.offer(), name="offer")
            await self._examination.examine()
            heartbeat.cancel()
            watch.cancel()

    async def _watch_stop_file(self) -> None:
        """Where nobody oversees the deployment: heed what asks for its end."""
        await self._rank.wait_for(self._rank.run.stop_file.exists, math.inf)
        self._rank.stop.set()

    def _tell_staging(self, detail: str) -> None:
        """How far the model is on its way to this node, beside each member that waits for it."""
        self._record.tell_detail([member.name for member in self._rank.plan.on(self._rank.number)], detail)


def _innermost(error: BaseException) -> BaseException:
    """The first single error in a tree of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
