"""The frontends of a rank that may lead, and the spare that stands by for them."""

from __future__ import annotations

import asyncio
import logging
import math
import os

from launch.errors import LaunchError
from launch.recipe import Launcher
from launch.standby import frontends_on
from slurm import commands, shield
from slurm.others import Others
from slurm.rank import Rank
from slurm.spare import Spare
from slurm.supervise import Supervised
from slurm.supervisor import Supervisor, all_stopped

log = logging.getLogger(__name__)

READY_S = 60.0
STANDBY_AGAIN_S = 30.0


class Frontends:
    """Started where this rank leads, and once the deployment is ready where it may come to lead.

    So one serves already when this rank has to lead, and none delays the start.
    """

    def __init__(self, rank: Rank, others: Others, supervisor: Supervisor) -> None:
        self._rank = rank
        self._others = others
        self._supervisor = supervisor
        self._running: dict[str, Supervised] = {}
        self._spare: Spare | None = None
        self._keeping: asyncio.Task[None] | None = None

    def start(self, group: asyncio.TaskGroup) -> None:
        """Keep them running, in this group, until the end is asked for."""
        for name in frontends_on(self._rank.plan, self._rank.number):
            group.create_task(self._keep(name), name=name)
        self._keeping = group.create_task(self._keep_spare(), name="spare")

    def end_spare(self) -> None:
        """Keep no spare any more: nobody takes a place that falls free now."""
        if self._keeping:
            self._keeping.cancel()

    async def stop(self) -> None:
        """Let them admit nothing more and finish what runs."""
        await all_stopped(list(self._running.values()))

    async def _keep(self, name: str) -> None:
        """
        Raises:
            ChildError: It did not start, on the head.
            DeploymentError: It was not ready in time, on the head.
        """
        stop = self._rank.stop
        while not stop.is_set():
            await self._rank.wait_for(self._due, math.inf, unless_stopped=True)
            if stop.is_set():
                return
            invocation = commands.frontend(name, self._rank.run.path, self._expires_at())
            item = self._supervisor.member(name, invocation, READY_S, spare=self._spare_of_all())
            self._running[name] = item
            try:
                await item.run()
            except (LaunchError, OSError) as error:
                if self._others.led_from_here:
                    raise
                log.error("%s does not start; rank %d cannot lead without: %s", name, self._rank.number, error)
                await self._rank.wait_for(self._others.is_head, STANDBY_AGAIN_S, unless_stopped=True)

    async def _keep_spare(self) -> None:
        """A spare, once there is a frontend; for ever."""
        await self._rank.wait_for(self._due, math.inf)
        await self._spare_of_all().keep()

    def _spare_of_all(self) -> Spare:
        if self._spare is None:
            run = self._rank.run
            invocation = commands.spare_frontend(run.path, self._expires_at())
            log_path = run.log_of(self._rank.attempt, f"spare-{self._rank.number}")
            self._spare = Spare(invocation.argv, {**os.environ, **invocation.env}, log_path, shield.needed(os.environ))
        return self._spare

    def _due(self) -> bool:
        endpoint = self._rank.run.endpoint()
        if endpoint is None or self._others.is_head():
            return endpoint is not None
        # Nodes played by one machine have but one such port between them.
        alone = self._rank.job.launcher is Launcher.LOCAL and self._rank.recipe.frontend.port is not None
        return endpoint.state.serves and not alone

    def _expires_at(self) -> float | None:
        endpoint = self._rank.run.endpoint()
        return endpoint.expires_at if endpoint else None
