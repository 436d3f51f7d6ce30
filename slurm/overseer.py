"""The head's view of the whole deployment: what `endpoint.json` says, and when everybody has to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from launch.elastic import Following, short_of
from launch.errors import DeploymentError
from launch.plan import FRONTEND_PORT, Plan, shared_port
from launch.recipe import Kind, Launcher, Recipe, ServedModel
from launch.records import SILENT_AFTER_S, Endpoint, Job, Phase, RankRecord, RunDirectory, State
from launch.standby import frontends_on
from launch.trust import trusting
from slurm import limit
from slurm.head import Headship
from slurm.heard import Heard
from slurm.places import Place

log = logging.getLogger(__name__)

POLL_S = 0.1
SETTLED_POLL_S = 0.5


class Overseer:
    """Publishes the endpoint and its state; sets `stop` when somebody asks for the end or a rank has failed."""

    def __init__(
        self,
        run: RunDirectory,
        recipe: Recipe,
        plan: Plan,
        job: Job,
        stop: asyncio.Event,
        rank: int,
        head: Headship,
        heard: Heard,
    ) -> None:
        """Make it on the rank that leads; `heard` is kept up to date here."""
        self._run = run
        self._recipe = recipe
        self._plan = plan
        self._job = job
        self._stop = stop
        self._rank = rank
        self._head = head
        self._heard = heard
        self._following = Following(run, recipe, job.attempt)
        self._served: set[str] = set()
        self._was_ready = False
        self._withheld = False
        self._begun = time.monotonic()
        self._targets_told: list[dict[str, Any]] = []
        self._endpoint: Endpoint | None = None

    @contextlib.asynccontextmanager
    async def published(self) -> AsyncIterator[Endpoint]:
        """The endpoint, from its first word to `stopped`."""
        ranks, before = self._run.ranks(self._job.attempt), self._run.endpoint()
        place = Place(ranks[self._rank].address, ranks[self._rank].port_base)
        if before and before.head != self._rank and before.head in ranks:
            self._heard.doubt(ranks[before.head])  # it would lead still
        self._was_ready = before is not None and before.state.serves
        shared = shared_port(self._recipe, place)
        count = len(self._plan.frontends)
        own = [shared] if count == 1 else [int(place.port(FRONTEND_PORT + index)) for index in range(count)]
        scheme = self._recipe.scheme
        self._endpoint = Endpoint(
            url=f"{scheme}://{place.address}:{shared}/v1",
            urls=[f"{scheme}://{place.address}:{port}/v1" for port in own],
            # The first is the one that users are shown how to ask.
            models=[served.model.name for served in sorted(self._recipe.models, key=_embeds)],
            state=Phase.DEGRADED if self._was_ready else Phase.STARTING,
            api_key_file=str(self._run.api_key_file),
            expires_at=await asyncio.to_thread(self._expires_at),
            head=self._rank,
            term=self._head.term,
            lost=before.lost if before else [],
        )
        self._run.put_endpoint(self._endpoint)
        try:
            yield self._endpoint
        finally:
            with contextlib.suppress(OSError):
                self._publish(Phase.STOPPED, self._endpoint.lost)

    async def watch(self) -> None:
        """Follow the ranks and the stop file; for ever.

        Raises:
            DeploymentError: A rank did not start in time.
        """
        troubled = False
        while True:
            try:
                await self._look()
                troubled = False
            except OSError as error:
                if not troubled:
                    log.warning("the run directory cannot be read or written (%s); looking again", error)
                troubled = True
            settled = self._endpoint and self._endpoint.state is not Phase.STARTING
            await asyncio.sleep(SETTLED_POLL_S if settled else POLL_S)

    async def _look(self) -> None:
        if self._run.stop_file.exists():
            self._stop.set()
        ranks = self._run.ranks(self._job.attempt)
        self._plan = self._following.look()  # after the records: what they say of members that have left is not missed
        if any(record.failure for rank, record in ranks.items() if rank < self._plan.ranks):
            self._stop.set()
        absent = sorted(set(range(self._plan.ranks)) - set(ranks))
        if absent and time.monotonic() - self._begun > self._recipe.engine.ready_timeout_s:
            raise DeploymentError(f"ranks {absent} did not start: see {self._run.logs(self._job.attempt)}")
        self._heard.look(ranks)
        self._publish(await self._phase(ranks), self._heard.lost(ranks))
        targets = self._targets(ranks)
        if targets != self._targets_told and self._may_publish():
            self._run.put_targets(targets)
            self._targets_told = targets

    async def _phase(self, ranks: Mapping[int, RankRecord]) -> Phase:
        if self._stop.is_set():
            return Phase.DRAINING
        heard = [record for record in ranks.values() if not self._heard.silent(record.rank)]
        states = {name: member.state for record in heard for name, member in record.members.items()}
        self._served |= {name for name, state in states.items() if state is State.READY}
        names = (*self._expected(), *frontends_on(self._plan, self._rank))
        whole = all(states.get(name) is State.READY for name in names)
        if not whole:
            return Phase.DEGRADED if self._was_ready else Phase.STARTING
        if not self._was_ready:
            self._was_ready = await self._routed()
        if self._was_ready and self._short():
            return Phase.DEGRADED
        return Phase.READY if self._was_ready else Phase.STARTING

    def _expected(self) -> list[str]:
        """Members that have to be ready: those of the job, and of the extensions those that have been."""
        members = self._plan.members
        return [m.name for m in members if m.rank < self._plan.ranks or m.name in self._served]

    def _short(self) -> bool:
        """Whether an engine was lost and no other serves in its place."""
        serving = {m.engine for m in self._plan.members if m.name in self._served}
        return bool(short_of(self._following.gone.values(), self._following.joined, serving))

    async def _routed(self) -> bool:
        """Whether every frontend says that it can answer and misses nobody."""
        assert self._endpoint
        return all([await self._answers(url) for url in self._endpoint.urls])

    async def _answers(self, url: str) -> bool:
        host, _, port = url.partition("://")[2].removesuffix("/v1").partition(":")
        secure = trusting(self._recipe.frontend.tls_cert)
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection(host, int(port), ssl=secure)
                writer.write(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                said = await reader.read()
                writer.close()
        except (OSError, TimeoutError):
            return False
        return said.endswith(b'"status":"ready"}')

    def _publish(self, phase: Phase, lost: list[int]) -> None:
        own = self._endpoint
        assert own
        changed = (phase, lost) != (own.state, own.lost)
        if own.state is Phase.STOPPED or not (changed or self._overwritten()):
            return
        if not self._may_publish():
            if not self._withheld:
                log.warning("rank %d is not sure to lead: it publishes nothing", self._rank)
            self._withheld = True
            return
        self._withheld = False
        if phase is not own.state:
            log.info("the deployment is %s", phase)
        for rank in set(lost) - set(own.lost):
            log.warning("rank %d is lost: it was not heard for %.0f s", rank, SILENT_AFTER_S)
        self._run.put_endpoint(msgspec.structs.replace(own, state=phase, lost=lost))
        own.state, own.lost = phase, lost

    def _overwritten(self) -> bool:
        """Whether the endpoint is not ours: a head before us, held up for long, wrote it after we had."""
        published = self._run.endpoint() if self._head.contested else None
        return published is not None and published.term < self._head.term

    def _may_publish(self) -> bool:
        """Whether what we say is the head's word: nobody later has spoken, and nobody else can have been elected.

        While all stop, nobody is elected any more, and etcd ends before the last word.
        """
        if not self._head.contested:
            return True
        published = self._run.endpoint()
        if published and published.term > self._head.term and published.head != self._rank:
            return False
        return self._head.sure or (self._head.leads and self._stop.is_set())

    def _expires_at(self) -> float | None:
        """When Slurm ends the job; where nobody can say, our own limit is counted from now."""
        end = limit.ends_at(self._job.launcher, os.environ)
        if end is None and self._job.launcher is Launcher.SLURM:
            return time.time() + 60 * self._recipe.slurm.time_min
        return end

    def _targets(self, ranks: Mapping[int, RankRecord]) -> list[dict[str, Any]]:
        """Every metrics page, in Prometheus' file_sd form."""
        found: list[dict[str, Any]] = []
        for member in self._plan.members:
            record = ranks.get(member.rank)
            if record:
                page = f"{record.address}:{record.port_base + member.ports.metrics}"
                labels = {"role": str(member.kind), "replica": str(member.replica), "member": member.name}
                labels["model"] = self._recipe.of(member.model).model.name
                found.append({"targets": [page], "labels": {"deployment": self._recipe.name, **labels}})
        assert self._endpoint
        for name, url in zip(frontends_on(self._plan, self._rank), self._endpoint.urls, strict=True):
            page = url.partition("://")[2].removesuffix("/v1")
            labels = {"deployment": self._recipe.name, "role": "frontend", "member": name}
            labels |= {"__scheme__": "https"} if self._recipe.scheme == "https" else {}
            found.append({"targets": [page], "labels": labels})
        return found


def _embeds(served: ServedModel) -> bool:
    return all(role.kind is Kind.EMBEDDING for role in served.roles)
