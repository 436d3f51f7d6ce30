"""Rank 0's view of the whole deployment: what `endpoint.json` says, and when everybody has to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from launch.plan import FRONTEND_PORT, Plan
from launch.recipe import Launcher, Recipe
from launch.records import Endpoint, Job, Phase, RankRecord, RunDirectory, State

log = logging.getLogger(__name__)

POLL_S = 0.1


class Overseer:
    """Publishes the endpoint and its state; sets `stop` when somebody asks for the end or a rank has failed."""

    def __init__(self, run: RunDirectory, recipe: Recipe, plan: Plan, job: Job, stop: asyncio.Event) -> None:
        self._run = run
        self._recipe = recipe
        self._plan = plan
        self._job = job
        self._stop = stop
        self._was_ready = False
        self._endpoint: Endpoint | None = None

    @contextlib.asynccontextmanager
    async def published(self) -> AsyncIterator[None]:
        """The endpoint, from its first word to `stopped`."""
        rank0 = self._run.ranks(self._job.attempt)[0]
        first = self._recipe.frontend.port or rank0.port_base + FRONTEND_PORT
        urls = [f"http://{rank0.address}:{first + i}/v1" for i in range(len(self._plan.frontends))]
        self._endpoint = Endpoint(
            url=urls[0],
            urls=urls,
            models=[self._recipe.model.name],
            state=Phase.STARTING,
            api_key_file=str(self._run.api_key_file),
            expires_at=self._expires_at(),
        )
        self._run.put_endpoint(self._endpoint)
        try:
            yield
        finally:
            self._publish(Phase.STOPPED)

    async def watch(self) -> None:
        """Follow the ranks and the stop file; for ever."""
        targets: list[dict[str, Any]] = []
        while True:
            ranks = self._run.ranks(self._job.attempt)
            failure = next((record.failure for record in ranks.values() if record.failure), None)
            if self._run.stop_file.exists() or failure:
                self._stop.set()
            self._publish(await self._phase(ranks))
            found = self._targets(ranks)
            if found != targets:
                targets = found
                self._run.put_targets(found)
            await asyncio.sleep(POLL_S)

    async def _phase(self, ranks: Mapping[int, RankRecord]) -> Phase:
        if self._stop.is_set():
            return Phase.DRAINING
        states = {name: record.state for rank in ranks.values() for name, record in rank.members.items()}
        names = [*(member.name for member in self._plan.members), *self._plan.frontends]
        whole = all(states.get(name) is State.READY for name in names)
        if not whole:
            return Phase.DEGRADED if self._was_ready else Phase.STARTING
        if not self._was_ready:
            self._was_ready = await self._routed()
        return Phase.READY if self._was_ready else Phase.STARTING

    async def _routed(self) -> bool:
        """Whether the first frontend says that it can answer."""
        assert self._endpoint
        host, _, port = self._endpoint.url.removeprefix("http://").removesuffix("/v1").partition(":")
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                status = await reader.readline()
                writer.close()
        except (OSError, TimeoutError):
            return False
        return b" 200 " in status

    def _publish(self, phase: Phase) -> None:
        assert self._endpoint
        if phase is not self._endpoint.state and self._endpoint.state is not Phase.STOPPED:
            log.info("the deployment is %s", phase)
            self._endpoint.state = phase
            self._run.put_endpoint(self._endpoint)

    def _expires_at(self) -> float | None:
        """When Slurm ends the job; SLURM_JOB_END_TIME is absent in Slurm 22.05, then our own limit is counted from now."""
        if self._job.launcher is not Launcher.SLURM:
            return None
        end = os.environ.get("SLURM_JOB_END_TIME")
        return float(end) if end else time.time() + 60 * self._recipe.slurm.time_min

    def _targets(self, ranks: Mapping[int, RankRecord]) -> list[dict[str, Any]]:
        """Every metrics page, in Prometheus' file_sd form."""
        found: list[dict[str, Any]] = []
        for member in self._plan.members:
            record = ranks.get(member.rank)
            if record and member.leader:
                page = f"{record.address}:{record.port_base + member.ports.metrics}"
                labels = {"role": str(member.kind), "replica": str(member.replica), "member": member.name}
                found.append({"targets": [page], "labels": {"deployment": self._recipe.name, **labels}})
        assert self._endpoint
        for name, url in zip(self._plan.frontends, self._endpoint.urls, strict=True):
            page = url.removeprefix("http://").removesuffix("/v1")
            labels = {"deployment": self._recipe.name, "role": "frontend", "member": name}
            found.append({"targets": [page], "labels": labels})
        return found
