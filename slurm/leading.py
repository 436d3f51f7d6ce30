"""What a rank that may lead does for the whole deployment: it runs the control plane, and oversees while it is the head.

Rank 0 decides on the control plane and publishes it; with a standby the servers of three ranks form one, and who is head is
claimed there (`slurm.head`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from launch.errors import DeploymentError
from launch.recipe import Launcher
from launch.records import Control, Head, Life, RankRecord
from slurm import children, control
from slurm.head import Headship
from slurm.losses import Losses
from slurm.others import Others
from slurm.overseer import Overseer
from slurm.rank import Rank, holds
from slurm.record import OwnRecord
from slurm.succession import Succession
from slurm.supervise import Supervised
from slurm.supervisor import SHUTDOWN_S, Supervisor, all_stopped
from workers.runtime.etcd import Etcd

log = logging.getLogger(__name__)

START_POLL_S = 0.02  # every start waits for it


class Leading:
    """The part of one rank in leading. `published` is set once it has published an endpoint."""

    def __init__(self, rank: Rank, record: OwnRecord, others: Others, supervisor: Supervisor) -> None:
        self.published = asyncio.Event()
        self._rank = rank
        self._run = rank.run
        self._recipe = rank.recipe
        self._record = record
        self._others = others
        self._supervisor = supervisor
        # An agent begins with its process, imports included; the debug launcher's process began long before.
        self._started = time.monotonic() - (0.0 if rank.job.launcher is Launcher.DEBUG else process_age_s())

    # --- the control plane ------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def control_plane(self, group: asyncio.TaskGroup) -> AsyncIterator[Headship]:
        """This rank's NATS and etcd, serving within the block, and who leads; they end after all members have.

        Raises:
            DeploymentError: The ranks with servers did not all start in time.
        """
        own, wait_for = self._rank.number, self._rank.wait_for
        headship = Headship(self._recipe.name, own)
        async with contextlib.AsyncExitStack() as stack:
            seed = await self._seed()
            servers_here = control.of_rank(self._run, self._recipe, seed, own) if seed else ()
            running = [self._supervisor.server(server) for server in servers_here]
            tasks = [group.create_task(item.run(), name=item.command.name) for item in running]
            await wait_for(lambda: self._serving(running), math.inf, unless_stopped=True, poll_s=START_POLL_S)
            if seed and len(self._others.control) > 1:
                etcd = await stack.enter_async_context(Etcd(seed.control))
                headship = Headship(self._recipe.name, own, etcd)
                keeper = group.create_task(headship.keep(self._may_lead), name="headship")
                stack.push_async_callback(_cancelled, keeper)
            if seed and own == 0:
                await wait_for(lambda: headship.leads, math.inf, unless_stopped=True, poll_s=START_POLL_S)
                self._publish_control(seed.control)
            yield headship
            grace = self._recipe.engine.drain_s + SHUTDOWN_S
            if any(not member.leader for member in self._rank.plan.members):
                grace *= 2  # followers end after their leaders
            await wait_for(self._others.all_quiet, grace)
            # One that is cut off and does not know that another leads must not wait for that one, which waits for it.
            if headship.leads and self._others.led_from_here:
                await wait_for(self._others.all_ended, grace)
            await all_stopped(running)
            await asyncio.gather(*tasks)

    async def _seed(self) -> control.Seed | None:
        """What rank 0 decided of the control plane; None when the end came first."""
        records: dict[int, RankRecord] = {}
        own, ranks = self._rank.number, self._others.control

        def decided() -> bool:
            if own:
                return control.reap(self._run, self._rank.attempt) is not None
            records.update((rank, found) for rank in ranks if (found := self._others.record_of(rank)))
            return len(records) == len(ranks)

        limit_s = self._recipe.engine.ready_timeout_s
        if not await self._rank.wait_for(decided, limit_s, unless_stopped=True, poll_s=START_POLL_S):
            raise DeploymentError(
                f"ranks {', '.join(map(str, ranks))} did not all start within {limit_s:.0f} s: "
                f"see {self._run.logs(self._rank.attempt)}"
            )
        if own:
            return control.reap(self._run, self._rank.attempt)
        if len(records) < len(ranks):
            return None
        return control.sow(self._run, [records[rank] for rank in ranks])

    def _serving(self, running: Sequence[Supervised]) -> bool:
        """Whether the servers serve; they never will when the other ranks with servers have failed, which ends the wait."""
        if all(item.first_ready.is_set() for item in running):
            return True
        found = [self._others.record_of(rank) for rank in self._others.control if rank != self._rank.number]
        if any(record and (record.failure or record.ended) for record in found):
            self._rank.stop.set()
        return False

    def _publish_control(self, decided: Control) -> None:
        ready_s = round(time.monotonic() - self._started, 3)
        self._record.said.control_ready_s = ready_s
        log.info("control plane ready %.2f s after the agent's start", ready_s)
        self._run.put_control(decided)
        self._record.save()

    # --- the head ---------------------------------------------------------------------------------------------------

    def _may_lead(self) -> bool:
        """Whether this rank may claim to lead: rank 0 from the start, others once it has led, and nobody at the end."""
        if self._rank.stop.is_set():
            return False
        return self._rank.number == 0 or holds(self._others.control_published)

    async def lead(self, headship: Headship) -> None:
        """Oversee the deployment whenever this rank is its head; for ever.

        Raises:
            DeploymentError: A rank did not start in time.
        """
        rank = self._rank
        while True:
            await headship.elected.wait()
            if headship.contested:
                self._run.put_head(Head(attempt=rank.attempt, rank=rank.number, term=headship.term))
            overseer = Overseer(
                rank.run, rank.recipe, rank.plan, rank.job, rank.stop, rank.number, headship, self._others.heard
            )
            async with overseer.published() as endpoint:
                log.info("rank %d leads (term %d): %s", rank.number, headship.term, endpoint.url)
                self.published.set()
                losses = Losses(rank.run, rank.recipe, rank.job, rank.number, lambda: headship.sure)
                leads = functools.partial(_leads_still, headship, headship.term)
                await _first(overseer.watch(), headship.deposed.wait(), self._succession(leads).keep(), losses.watch())
            log.warning("rank %d no longer leads", rank.number)

    def _succession(self, leads: Callable[[], bool]) -> Succession:
        """The life of the attempt, and its place in a chain; it goes on from what an earlier head has said of it."""
        began = time.time() - (time.monotonic() - self._started)
        life = self._run.life(self._rank.attempt) or Life(started_at=began)
        return Succession(self._run, self._recipe, self._rank.job, self._rank.stop, life, leads)


def process_age_s() -> float:
    """Seconds since this process was started, by the kernel's clock."""
    ticks = children.born(os.getpid()) or 0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _leads_still(headship: Headship, term: int) -> bool:
    return headship.leads and headship.term == term


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _first(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when the first of them ends, the others cancelled and at their end; raises what it raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)  # one may have last words
