"""Joining and leaving a live deployment, as one rank sees it.

An agent that joined is like all others, but never the head; its rank comes after those of the job. When all of its engines
have left, it ends, and with the last of them its job. `Departures` takes engines out one at a time, on any rank: first they
withdraw, then they finish what runs, then they stop, and nobody starts them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from launch import elastic
from launch.elastic import Following
from launch.plan import Member, Plan
from launch.recipe import Recipe
from launch.records import Job, RunDirectory
from slurm import limit
from slurm.batch import notice_s

log = logging.getLogger(__name__)

POLL_S = 0.5


class Stoppable(Protocol):
    """A supervised member."""

    def expect_end(self) -> None:
        """It may end by itself from now on."""
        ...

    async def stop(self) -> None:
        """Stop it, gracefully."""
        ...


class Departures:
    """The members of one rank that leave before the deployment ends."""

    def __init__(
        self,
        following: Following,
        rank: int,
        ended: Callable[[Member], bool],
        until: Callable[[Callable[[], bool], float], Awaitable[bool]],
        grace_s: float,
    ) -> None:
        """
        Args:
            following: The plan as it is now.
            rank: The rank.
            ended: Whether nothing is left of a member of another rank.
            until: How the agent waits.
            grace_s: Seconds that followers wait for their leader's end.
        """
        self._following = following
        self._mine = following.look().on(rank)
        self.joined = following.plan.span(rank) is not None
        self._ended = ended
        self._until = until
        self._grace_s = grace_s
        self._leaving: set[str] = set()

    @property
    def over(self) -> bool:
        """Whether a rank that joined has nothing left to do."""
        return self.joined and all(member.engine in self._following.gone for member in self._mine)

    def left(self, engine: str) -> bool:
        """Whether an engine has been asked to leave."""
        self._following.look()
        return engine in self._following.gone

    def took(self, name: str) -> bool:
        """Whether a member is being stopped here, so that nobody else has to."""
        return name in self._leaving

    def give_up(self, run: RunDirectory, attempt: int, reason: str) -> None:
        """A rank that joined has failed: its engines leave, on all of their nodes, and the deployment lives on."""
        if self.joined:
            for member in self._mine:
                with contextlib.suppress(OSError):
                    elastic.leave(run, attempt, member.engine, reason)

    def end(self, run: RunDirectory, attempt: int) -> None:
        """A rank that joined ends before the deployment does: it is missed by nobody."""
        if self.joined and not run.stop_file.exists():
            self.give_up(run, attempt, f"job {os.environ.get('SLURM_JOB_ID', '')} was asked to end")

    async def watch(self, items: Mapping[str, Stoppable], stop: asyncio.Event) -> None:
        """Stop the members whose engines have to leave until the agent has to end, which is also when all have left."""
        async with asyncio.TaskGroup() as group:
            while not stop.is_set():
                for member in self._mine:
                    if member.name in items and member.name not in self._leaving and self.left(member.engine):
                        self._leaving.add(member.name)
                        gone = self._following.gone[member.engine]
                        log.info("%s leaves: %s", member.name, gone.reason)
                        group.create_task(self._leave(member, items[member.name]), name=f"leave-{member.name}")
                self._following.look()
                if self.over:
                    log.info("all engines of this rank have left")
                    stop.set()
                await _either(stop, POLL_S)

    async def _leave(self, member: Member, item: Stoppable) -> None:
        item.expect_end()
        if not member.leader:  # an engine finishes with all of its nodes
            head = next((m for m in self._others(member) if m.node == 0), None)
            if head is not None:
                await self._until(functools.partial(self._ended, head), self._grace_s)
        await item.stop()

    def _others(self, member: Member) -> tuple[Member, ...]:
        """All members of an engine that has left, so that the plan no longer names them."""
        return self._following.whole.members_of(member.engine)


async def _either(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass


async def leave_before_the_limit(
    run: RunDirectory, recipe: Recipe, job: Job, where: Plan, rank: int, notice: asyncio.Event
) -> None:
    """After Slurm's notice to the job that joined, let its engines leave in time; the deployment lives on without them."""
    await notice.wait()
    end = await asyncio.to_thread(limit.ends_at, job.launcher, os.environ)
    await asyncio.sleep(limit.seconds_left(end, notice_s(recipe)))
    reason = f"the time limit of job {os.environ.get('SLURM_JOB_ID', '')} is near"
    for engine in dict.fromkeys(member.engine for member in where.on(rank)):
        elastic.leave(run, job.attempt, engine, reason)
