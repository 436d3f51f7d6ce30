"""The preflight of one rank, done: it tests its node and the way to its peers, answers the tests of others, and tells.

Every rank writes what it found; the head puts all of it together in `preflight.json`, which is also how the others know that
nobody tests them any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from launch import elastic
from launch.elastic import Following
from launch.plan import NIXL_PROBE_PORT, PREFLIGHT_PORT, Plan
from launch.recipe import Kind, Launcher, Level, OnBadNode, Recipe, When
from launch.records import RankRecord, RunDirectory
from launch.standby import control_ranks
from slurm import exclusion, fabric, preflight, probe
from slurm.fabric import Snapshot
from slurm.preflight import PreflightError, Report
from slurm.probe import Link

log = logging.getLogger(__name__)

# What a rank that joins waits for others to notice it, on a slow file system, before they answer its tests.
NOTICED_S = 60.0
AGAIN_S = 1.0


class Waiting(Protocol):
    """How the agent waits: polls until a condition holds, it is asked to stop, or the time is over."""

    def __call__(
        self, condition: Callable[[], bool], timeout_s: float, unless_stopped: bool = False
    ) -> Awaitable[bool]:
        """Whether the condition held."""
        ...


class Examination:
    """What one rank does before its engines start. `sound` is set once it may start them, unless it is `left_out`."""

    def __init__(
        self,
        run: RunDirectory,
        recipe: Recipe,
        plan: Plan,
        launcher: Launcher,
        record: RankRecord,
        visible: tuple[str, ...] | None,
        waiting: Waiting,
        stop: asyncio.Event,
        leads: Callable[[], bool],
    ) -> None:
        self.sound = asyncio.Event()
        self.left_out = False
        self.buses: tuple[str, ...] = ()
        self.snapshot = Snapshot()
        self._run = run
        self._recipe = recipe
        self._plan = plan
        self._record = record
        self._visible = visible
        self._waiting = waiting
        self._stop = stop
        self._leads = leads
        self._launcher = launcher
        self._span = plan.span(record.rank)
        self._wide = preflight.between(recipe, launcher, plan)
        self._answering: asyncio.Server | None = None

    async def listen(self) -> None:
        """Answer the tests of others; before the record says where, as they test as soon as they read it."""
        if self._wide:
            self._answering = await probe.start(self._record.address, self._record.port_base + PREFLIGHT_PORT)

    def close(self) -> None:
        """Answer no more."""
        if self._answering:
            self._answering.close()

    async def examine(self) -> None:
        """Test, write what was found, and wait until all ranks have.

        Raises:
            PreflightError: This node is not fit; says why, and what to do.
        """
        recipe = self._recipe
        if recipe.preflight.level is Level.OFF:
            self.sound.set()
            return
        report = await self._report()
        self._run.put_preflight(report.rank, msgspec.json.format(msgspec.json.encode(report)))
        if report.failed and not self._stop.is_set():  # a peer that was stopped before it began is no fault
            # The others' tests of this node are not to fail because it has gone.
            shrink = recipe.preflight.on_bad_node is OnBadNode.EXCLUDE_AND_SHRINK and not self._span
            await self._tell_verdict(recipe.engine.ready_timeout_s if shrink else recipe.preflight.timeout_s)
            if not (shrink and self._goes_on()):
                raise PreflightError(report)
        self.sound.set()
        await self._tell_verdict(recipe.engine.ready_timeout_s)
        self.close()

    async def offer(self) -> None:
        """Hold a block for decode nodes to pull by NIXL, until every rank has reported."""
        recipe, installed = self._recipe, preflight.nixl_installed()
        if not self._wide or not preflight.offers_kv(recipe, self._plan, self._record.rank, installed):
            return
        if recipe.preflight.kv is When.AUTO and not await self._decodes_elsewhere():
            return
        async with self._offering():
            await self._waiting(self._all_reported, recipe.engine.ready_timeout_s, unless_stopped=True)

    async def answer_joiners(self, following: Following) -> None:
        """Answer the tests of ranks that join, for as long as they test and no longer; for ever."""
        recipe, rank = self._recipe, self._record.rank
        while True:
            await asyncio.sleep(AGAIN_S)
            where = following.look()
            if not where.joined or not preflight.between(recipe, self._launcher, where) or not self.sound.is_set():
                continue
            found: list[RankRecord] = []
            with contextlib.suppress(OSError):  # the shared file system has a bad moment: look again
                found = self._testing(where)
            if not found:
                continue
            self.close()  # it may still answer the job's own ranks
            self._answering = await probe.start(self._record.address, self._record.port_base + PREFLIGHT_PORT)
            async with contextlib.AsyncExitStack() as around:
                elsewhere = any(record.host != self._record.host for record in found)
                offers = preflight.offers_kv(recipe, where, rank, preflight.nixl_installed())
                if offers and (elsewhere or recipe.preflight.kv is When.ALWAYS):
                    await around.enter_async_context(self._offering())
                await self._waiting(
                    lambda where=where: not self._testing(where),  # type: ignore[misc]  # a lambda's default has no type
                    recipe.engine.ready_timeout_s,
                    unless_stopped=True,
                )
            self.close()

    def _testing(self, where: Plan) -> list[RankRecord]:
        """The ranks of other jobs that have begun and not reported yet."""
        others = (rank for span in where.joined for rank in range(span.first, span.first + span.ranks))
        found = [self._peer(rank) for rank in others if where.span(rank) != self._span]
        return [each for each in found if each and not each.ended and self._run.preflight_of(each.rank) is None]

    def _offering(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Hold a block for others to pull by NIXL."""
        port, log_path = self._record.port_base + NIXL_PROBE_PORT, self._run.log_of(self._record.attempt, "nixl-probe")
        return probe.offering(
            self._record.address, port, self._recipe.cluster.nixl_backends[0], self._probe_environment(), log_path
        )

    def _gone(self) -> set[int]:
        """Ranks that a joining one does not meet any more."""
        if not self._span:
            return set()
        endpoint = self._run.endpoint()
        ended = {rank for rank, record in self._run.ranks(self._record.attempt).items() if record.ended}
        return {*(endpoint.lost if endpoint else ()), *ended} - {self._record.rank}

    async def _report(self) -> Report:
        rank, environ = self._record.rank, dict(os.environ)
        # Nodes that one machine plays have but one such port between them.
        leading = (0,) if self._launcher is Launcher.LOCAL else control_ranks(self._recipe, self._launcher)
        take = functools.partial(
            preflight.gather, self._recipe, rank in leading, self._run.path, self.snapshot, environ
        )
        test = self._test if self._wide else None
        report, facts = await preflight.examine(
            self._recipe, self._plan, self._record.attempt, rank, take, self._visible, test, self._gone()
        )
        report.node = environ.get("SLURMD_NODENAME", "")
        self.buses = preflight.buses(facts, self._visible)
        return report

    async def _test(self, peer: int) -> Link:
        """Test the way to another rank, once it is there."""
        recipe = self._recipe
        await self._waiting(lambda: self._peer(peer) is not None, recipe.engine.ready_timeout_s, unless_stopped=True)
        record = self._peer(peer)
        if record is None:
            return Link(peer=peer, host="", address="", error="it did not start")
        timeout_s = recipe.preflight.timeout_s
        deadline = time.monotonic() + (NOTICED_S if self._span and peer not in self._span else 0.0)
        link = await probe.measure(peer, record.host, record.address, record.port_base + PREFLIGHT_PORT, timeout_s)
        while link.error and time.monotonic() < deadline and not self._stop.is_set():
            await asyncio.sleep(AGAIN_S)
            link = await probe.measure(peer, record.host, record.address, record.port_base + PREFLIGHT_PORT, timeout_s)
        elsewhere, installed = record.host != self._record.host, preflight.nixl_installed()
        if not link.error and preflight.moves_kv(recipe, self._plan, self._record.rank, peer, elsewhere, installed):
            port, backend = record.port_base + NIXL_PROBE_PORT, recipe.cluster.nixl_backends[0]
            await probe.pull(link, record.address, port, backend, self._probe_environment(), timeout_s)
        return link

    def _peer(self, rank: int) -> RankRecord | None:
        with contextlib.suppress(OSError):  # the shared file system has a bad moment: look again
            return self._run.rank(self._record.attempt, rank)
        return None

    async def _decodes_elsewhere(self) -> bool:
        """Whether a rank with decode engines is on another host than this one."""
        ranks = {member.rank for member in self._plan.members if member.kind is Kind.DECODE}

        def elsewhere() -> bool:
            found = (self._peer(rank) for rank in ranks)
            return any(record is not None and record.host != self._record.host for record in found)

        # The first of them already waits for our block: the last may come a minute later.
        await self._waiting(
            lambda: elsewhere() or all(self._peer(rank) is not None for rank in ranks),
            self._recipe.engine.ready_timeout_s,
            unless_stopped=True,
        )
        return elsewhere()

    def _probe_environment(self) -> dict[str, str]:
        """As an engine's, with all usable devices of the node."""
        told = fabric.environment(self.snapshot, self._recipe.cluster, self._record.address, ())
        own = dict(self._recipe.engine.env)
        for one in self._recipe.each:
            if one.disaggregated:
                own |= one.engine.env
        return {**os.environ, **fabric.unless_told(told, os.environ), **own}

    def _all_reported(self) -> bool:
        """The head counts the reports, the others look for what it makes of them: one file for each, not all for all."""
        if self._span:
            others = range(self._span.first, self._span.first + self._span.ranks)
            return all(self._run.preflight_of(rank) is not None for rank in others)
        if not self._leads():
            return self._run.preflight_file.exists()
        return self._run.preflights_written() >= self._plan.ranks

    async def _tell_verdict(self, timeout_s: float) -> None:
        """Wait until every rank has reported; the head then publishes and logs it all."""
        await self._waiting(self._all_reported, timeout_s, unless_stopped=True)
        if not self._leads() or not self._all_reported():
            return
        reports = [msgspec.json.decode(content, type=Report) for content in self._run.preflights()]
        if self._recipe.preflight.on_bad_node is OnBadNode.EXCLUDE_AND_SHRINK:
            self._exclude(reports)
        self._run.put_preflight(None, msgspec.json.format(msgspec.json.encode(reports)))
        log.info("preflight:\n%s", preflight.table(reports))

    def _exclude(self, reports: list[Report]) -> None:
        """Take the engines of unfit nodes out of the deployment, if it can go on without them."""
        bad = exclusion.bad_ranks(reports, self._recipe)
        why_not = exclusion.cannot_go_on(bad, self._plan)
        if why_not:
            log.error("%s: %s", why_not, "; ".join(bad.values()))
            return
        for rank, reason in bad.items():
            log.warning("going on without rank %d: %s", rank, reason)
            for member in self._plan.on(rank):
                elastic.leave(self._run, self._record.attempt, member.engine, reason, lost=True)

    def _goes_on(self) -> bool:
        """Whether the deployment goes on though this node failed a test: the same result as rank 0's, from the same reports."""
        content = self._run.preflight()
        if content is None:
            return False
        bad = exclusion.bad_ranks(msgspec.json.decode(content, type=list[Report]), self._recipe)
        self.left_out = self._record.rank in bad  # rank 0's files that say so may be seen later
        return exclusion.cannot_go_on(bad, self._plan) is None
