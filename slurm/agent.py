"""The agent: one for each rank. It claims the rank's ports, starts the members that the plan gives it, keeps them running,
tells the run directory how they are, and ends them in order.

The agents of ranks that may lead (`launch.standby`) also run the control plane and frontends; the one that does lead, the
head (`slurm.head`), publishes the state of the whole deployment. All others follow it.

Ending, in order: frontends stop admitting and finish what runs; then engines withdraw and stop, on all ranks; then, when
nothing is left of them, the control plane; the head is the last to go.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from launch.elastic import Following
from launch.errors import DeploymentError, LaunchError
from launch.plan import Member, Plan
from launch.recipe import Executor, Launcher, Recipe
from launch.records import Head, Job, Life, MemberRecord, RankRecord, RunDirectory, State
from launch.standby import control_ranks, frontends_on
from slurm import children, commands, control, extension, fabric, ghost, hosts, limit, ports, shield, signals
from slurm.batch import notice_s
from slurm.examination import Examination
from slurm.extension import Departures
from slurm.head import Headship
from slurm.heard import Heard
from slurm.losses import Losses
from slurm.overseer import Overseer
from slurm.places import Place
from slurm.spare import Spare
from slurm.staging import Staging
from slurm.succession import Succession
from slurm.supervise import Command, Supervised
from slurm.together import Together
from workers.control import servers
from workers.engine.arguments import role_of
from workers.runtime.awake import AwakeClock
from workers.runtime.etcd import Etcd

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
POLL_S = 0.2
SERVER_READY_S = 60.0
FRONTEND_READY_S = 60.0
LOST_HEAD_S = 60.0
STANDBY_AGAIN_S = 30.0


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
    _install_signals(stop, notice, agents)
    children.become_subreaper()
    recipe, job = run.recipe(), run.job()
    if job is None:
        raise LaunchError(f"{run.path} has no job.json: launch with `python -m launch`")
    where = Following(run, recipe, job.attempt).look()
    agents.extend(Agent(run, recipe, where, job, rank, stop) for rank in ranks)

    def leads() -> bool:
        return any(agent.leads for agent in agents)

    joined = where.span(ranks[0]) is not None
    watch = asyncio.create_task(
        extension.leave_before_the_limit(run, recipe, job, where, ranks[0], notice)
        if joined
        else _stop_before_the_limit(recipe, job, leads, notice, stop),
        name="limit",
    )
    results = await asyncio.gather(*(agent.run(job_key) for agent in agents), return_exceptions=True)
    watch.cancel()
    await ghost.end(run, job, [rank for rank in agents[0].lost if rank < where.ranks], os.environ)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _install_signals(stop: asyncio.Event, notice: asyncio.Event, agents: list[Agent]) -> None:
    """SIGTERM, SIGINT, USR2 and what `launch.stop` sends ask for the end; a second SIGTERM or SIGINT ends everything at once.

    One that comes within a moment is the same wish: scancel's comes from Slurm and from srun.
    Slurm's notice before the time limit only announces it. What came before we listened counts as well.
    """
    asked_at = math.inf

    def insist() -> None:
        nonlocal asked_at
        now = time.monotonic()
        if now - asked_at > signals.AGAIN_AFTER_S:
            log.warning("asked again: ending everything now")
            for agent in agents:
                agent.kill()
        asked_at = min(asked_at, now)
        stop.set()

    loop = asyncio.get_running_loop()
    handlers: dict[int, Callable[[], None]] = {signal.SIGTERM: insist, signal.SIGINT: insist}
    handlers |= {signals.NOTICE: notice.set, signals.STOP: stop.set, signal.SIGUSR2: stop.set}
    for signum, handler in handlers.items():
        loop.add_signal_handler(signum, handler)
    for signum in signals.came():
        handlers[signum]()


async def _stop_before_the_limit(
    recipe: Recipe, job: Job, leads: Callable[[], bool], notice: asyncio.Event, stop: asyncio.Event
) -> None:
    """After Slurm's notice, set `stop` when what runs can still finish before the time limit, and not before.

    The notice comes up to a minute early, and the limit may be moved: so the time is asked for, by the head for all.
    """
    await notice.wait()
    while not leads():  # noqa: ASYNC110  # what changes is a file
        await asyncio.sleep(POLL_S)  # the head decides for all, see `Agent._follow_head`; this rank may become it yet
    need_s = notice_s(recipe)
    while True:
        end = await asyncio.to_thread(limit.ends_at, job.launcher, os.environ)
        left = limit.seconds_left(end, need_s)
        if not left:
            break
        log.info("Slurm ends the job in %.0f s; requests are admitted for another %.0f s", left + need_s, left)
        await asyncio.sleep(left)
    log.info("the time limit is near: stopping")
    stop.set()


class Agent:
    """The agent of one rank."""

    def __init__(
        self, run: RunDirectory, recipe: Recipe, where: Plan, job: Job, rank: int, stop: asyncio.Event
    ) -> None:
        self._run = run
        self._recipe = recipe
        self._plan = where
        self._job = job
        self._rank = rank
        self._stop = stop
        self._supervised: list[Supervised] = []
        self._spare: Spare | None = None
        self._frontends: dict[str, Supervised] = {}
        self._together: dict[str, Together] = {}
        self._control_ranks = control_ranks(recipe, job.launcher)
        self._heard = Heard()
        self._published = asyncio.Event()
        self._unwritten = False
        # An agent begins with its process, imports included; the debug launcher's process began long before.
        self._started = time.monotonic() - (0.0 if job.launcher is Launcher.DEBUG else process_age_s())
        self._record = RankRecord(
            attempt=job.attempt,
            rank=rank,
            host=socket.gethostname(),
            address="",
            port_base=0,
            pid=os.getpid(),
            born=children.born(os.getpid()) or 0,
            heartbeat=time.time(),
            members={},
            step=own_step(os.environ),
        )
        self._following = Following(run, recipe, job.attempt)
        self._departures = Departures(
            self._following, rank, self._has_ended, self._wait_for, grace_s=recipe.engine.drain_s + 20
        )
        self._examination = Examination(
            run, recipe, where, job.launcher, self._record, self._devices(), self._wait_for, stop, self._is_head
        )
        self._staging = Staging(run, recipe, where, self._record, os.environ, self._wait_for, stop, self._note_staging)

    @property
    def leads(self) -> bool:
        """Whether this rank is the head."""
        return _holds(self._is_head)

    @property
    def lost(self) -> list[int]:
        """Ranks that ended without a word, as far as is known."""
        try:
            return self._lost_of(self._run.ranks(self._job.attempt))
        except OSError:
            return []

    def _lost_of(self, ranks: Mapping[int, RankRecord]) -> list[int]:
        endpoint = self._run.endpoint()
        self._heard.look(ranks)
        told = endpoint.lost if endpoint else []
        return sorted({*self._heard.lost(ranks), *(rank for rank in told if rank in ranks and not ranks[rank].ended)})

    def kill(self) -> None:
        """End every child at once."""
        for item in self._supervised:
            item.kill()

    async def run(self, job_key: str) -> None:
        """Be the agent until the deployment ends.

        Raises:
            LaunchError: Something of this rank failed; its record says what.
        """
        try:
            await self._run_rank(job_key)
        except BaseException as error:
            self._record.failure = str(_innermost(error)) or type(_innermost(error)).__name__
            log.error("rank %d: %s", self._rank, _innermost(error))
            self._departures.give_up(self._run, self._job.attempt, self._record.failure)
            raise
        finally:
            self._record.ended = True
            self._save()

    async def _run_rank(self, job_key: str) -> None:
        with ports.claim(job_key, self._rank) as block, contextlib.closing(self._examination):
            self._examination.snapshot = await asyncio.to_thread(fabric.read, hosts.interfaces())
            self._record.address = self._address()
            self._record.port_base = block.base
            await self._examination.listen()
            for member in self._plan.on(self._rank):
                self._note(member.name, State.STARTING, 0, "")
            self._save()
            try:
                if self._recipe.preflight.only:
                    await self._only_preflight()
                    return
                async with asyncio.TaskGroup() as group:
                    background = [
                        group.create_task(self._heartbeat(), name="heartbeat"),
                        group.create_task(self._examination.examine(), name="preflight"),
                        group.create_task(self._examination.offer(), name="offer"),
                        group.create_task(self._examination.answer_joiners(self._following), name="joiners"),
                        group.create_task(self._follow_head(), name="head"),
                    ]
                    if self._rank in self._control_ranks:
                        async with self._control_plane(group) as headship:
                            lead = group.create_task(self._lead(headship), name="lead")
                            if headship.leads:
                                await self._published.wait()
                            await self._members(group)
                            lead.cancel()
                            await asyncio.wait([lead])  # its last word
                    else:
                        await self._members(group)
                    for task in background:
                        task.cancel()
            except* (LaunchError, OSError) as errors:
                raise _innermost(errors) from None

    async def _members(self, group: asyncio.TaskGroup) -> None:
        """Frontends (of ranks that may lead) and engine members, from their start to their end."""
        await self._wait_for_control()
        limit_s = self._recipe.engine.ready_timeout_s + 2 * self._recipe.preflight.timeout_s
        if not await self._wait_for(self._examination.sound.is_set, limit_s, unless_stopped=True):
            raise DeploymentError(f"the preflight of rank {self._rank} did not end: see its log")
        if not self._examination.left_out:
            await self._staging.run()
        keeping = []
        if self._rank in self._control_ranks:
            for name in frontends_on(self._plan, self._rank):
                group.create_task(self._keep_frontend(name), name=name)
            keeping.append(group.create_task(self._keep_spare(), name="spare"))
        leaders: list[Supervised] = []
        followers: list[tuple[Member, Supervised]] = []
        for member in self._plan.on(self._rank):
            await self._wait_for_rank(self._plan.leader_of(member.engine).rank)
            self._refuse_loopback()
            if self._stop.is_set():
                break
            if self._examination.left_out or self._departures.left(member.engine):
                self._note(member.name, State.STOPPED, 0, "left out")
                continue
            item = self._engine(member)
            if member.leader:
                leaders.append(item)
            else:
                followers.append((member, item))
        for item in (*leaders, *(item for _, item in followers)):
            group.create_task(item.run(), name=item.command.name)
        engines = {item.command.name: item for item in (*leaders, *(item for _, item in followers))}
        leaving = group.create_task(self._departures.watch(engines, self._stop), name="departures")
        await self._stop.wait()
        for task in keeping:
            task.cancel()
        leaders = [item for item in leaders if not self._departures.took(item.command.name)]
        followers = [(member, item) for member, item in followers if not self._departures.took(item.command.name)]
        self._departures.end(self._run, self._job.attempt)
        for item in (*leaders, *(item for _, item in followers)):
            item.expect_end()
        await _all_stopped(list(self._frontends.values()))
        self._record.drained = True
        self._save()
        if not self._departures.joined or self._run.stop_file.exists():
            await self._wait_for(self._frontends_drained, self._recipe.engine.drain_s + 5)
        await _all_stopped(leaders)
        for member, _ in followers:
            # An engine finishes with all of its nodes: the others end after node 0 has.
            head = self._plan.leader_of(member.engine)
            await self._wait_for(functools.partial(self._has_ended, head), self._recipe.engine.drain_s + 20)
        await _all_stopped([item for _, item in followers])
        await leaving
        self._record.quiet = True
        self._save()

    @contextlib.asynccontextmanager
    async def _control_plane(self, group: asyncio.TaskGroup) -> AsyncIterator[Headship]:
        """This rank's NATS and etcd, serving within the block, and who leads; they end after all members have."""
        headship = Headship(self._recipe.name, self._rank)
        async with contextlib.AsyncExitStack() as stack:
            seed = await self._seed()
            servers_here = control.of_rank(self._run, self._recipe, seed, self._rank) if seed else ()
            running = [self._server(server) for server in servers_here]
            tasks = [group.create_task(item.run(), name=item.command.name) for item in running]
            await self._wait_for(lambda: self._serving(running), math.inf, unless_stopped=True, poll_s=0.02)
            if seed and len(self._control_ranks) > 1:
                etcd = await stack.enter_async_context(Etcd(seed.control))
                headship = Headship(self._recipe.name, self._rank, etcd)
                keeper = group.create_task(headship.keep(self._may_lead), name="headship")
                stack.push_async_callback(_cancelled, keeper)
            if seed and self._rank == 0:
                await self._wait_for(lambda: headship.leads, math.inf, unless_stopped=True, poll_s=0.02)
                self._record.control_ready_s = round(time.monotonic() - self._started, 3)
                log.info("control plane ready %.2f s after the agent's start", self._record.control_ready_s)
                self._run.put_control(seed.control)
                self._save()
            yield headship
            grace = self._recipe.engine.drain_s + 15
            if any(not member.leader for member in self._plan.members):
                grace *= 2  # followers end after their leaders
            await self._wait_for(self._all_quiet, grace)
            if headship.leads:
                await self._wait_for(lambda: not self._others_running(), grace)
            await _all_stopped(running)
            await asyncio.gather(*tasks)

    async def _seed(self) -> control.Seed | None:
        """What rank 0 decided of the control plane; None when the end came first."""
        records: dict[int, RankRecord] = {}

        def decided() -> bool:
            if self._rank:
                return control.reap(self._run, self._job.attempt) is not None
            records.update((rank, found) for rank in self._control_ranks if (found := self._record_of(rank)))
            return len(records) == len(self._control_ranks)

        limit_s = self._recipe.engine.ready_timeout_s
        if not await self._wait_for(decided, limit_s, unless_stopped=True, poll_s=0.02):
            raise DeploymentError(
                f"ranks {', '.join(map(str, self._control_ranks))} did not all start within {limit_s:.0f} s: "
                f"see {self._run.logs(self._job.attempt)}"
            )
        if self._rank:
            return control.reap(self._run, self._job.attempt)
        if len(records) < len(self._control_ranks):
            return None
        return control.sow(self._run, [records[rank] for rank in self._control_ranks])

    def _serving(self, running: Sequence[Supervised]) -> bool:
        """Whether the servers serve; they never will when the other ranks with servers have failed, which ends the wait."""
        if all(item.first_ready.is_set() for item in running):
            return True
        found = [self._record_of(rank) for rank in self._control_ranks if rank != self._rank]
        if any(record and (record.failure or record.ended) for record in found):
            self._stop.set()
        return False

    def _may_lead(self) -> bool:
        """Whether this rank may claim to lead: rank 0 from the start, others once it has led, and nobody at the end."""
        if self._stop.is_set():
            return False
        with contextlib.suppress(OSError):
            return self._rank == 0 or self._control_published()
        return False

    async def _lead(self, headship: Headship) -> None:
        """Oversee the deployment whenever this rank is its head; for ever.

        Raises:
            DeploymentError: A rank did not start in time.
        """
        while True:
            await headship.elected.wait()
            if headship.contested:
                self._run.put_head(Head(attempt=self._job.attempt, rank=self._rank, term=headship.term))
            overseer = Overseer(
                self._run, self._recipe, self._plan, self._job, self._stop, self._rank, headship, self._heard
            )
            async with overseer.published() as endpoint:
                log.info("rank %d leads (term %d): %s", self._rank, headship.term, endpoint.url)
                self._published.set()
                losses = Losses(self._run, self._recipe, self._job, self._rank)
                leads = functools.partial(_leads_still, headship, headship.term)
                await _first(overseer.watch(), headship.deposed.wait(), self._succession(leads).keep(), losses.watch())
            log.warning("rank %d no longer leads", self._rank)

    def _succession(self, leads: Callable[[], bool]) -> Succession:
        """The life of the attempt, and its place in a chain; it goes on from what an earlier head has said of it."""
        began = time.time() - (time.monotonic() - self._started)
        life = self._run.life(self._job.attempt) or Life(started_at=began)
        return Succession(self._run, self._recipe, self._job, self._stop, life, leads)

    async def _keep_frontend(self, name: str) -> None:
        """A frontend, from the start where this rank leads, and once the deployment is ready where it may come to.

        So one serves already when this rank has to lead, and none delays the start.

        Raises:
            ChildError: It did not start, on the head.
            DeploymentError: It was not ready in time, on the head.
        """
        while not self._stop.is_set():
            await self._wait_for(self._frontends_due, math.inf, unless_stopped=True)
            if self._stop.is_set():
                return
            item = self._frontends[name] = self._frontend(name)
            try:
                await item.run()
            except (LaunchError, OSError) as error:
                if self.leads:
                    raise
                log.error("%s does not start; rank %d cannot lead without: %s", name, self._rank, error)
                await self._wait_for(lambda: self.leads, STANDBY_AGAIN_S, unless_stopped=True)

    def _frontends_due(self) -> bool:
        endpoint = self._run.endpoint()
        if endpoint is None or self._is_head():
            return endpoint is not None
        # Nodes played by one machine have but one such port between them.
        alone = self._job.launcher is Launcher.LOCAL and self._recipe.frontend.port is not None
        return endpoint.state.serves and not alone

    def _server(self, server: servers.Server) -> Supervised:
        return self._supervise(
            Command(
                name=server.name,
                argv=server.argv,
                env=os.environ,
                log_path=self._run.log_of(self._job.attempt, server.name),
                ready_timeout_s=SERVER_READY_S,
                stop_grace_s=5,
                ready=server.ready,
                folder=server.folder,
            )
        )

    def _frontend(self, name: str) -> Supervised:
        invocation = commands.frontend(name, self._run.path, self._expires_at())
        return self._child(name, invocation, FRONTEND_READY_S, spare=self._spare_frontend())

    async def _keep_spare(self) -> None:
        """A spare for the frontends of this rank, once it has any; for ever."""
        await self._wait_for(self._frontends_due, math.inf)
        await self._spare_frontend().keep()

    def _spare_frontend(self) -> Spare:
        if self._spare is None:
            invocation = commands.spare_frontend(self._run.path, self._expires_at())
            log_path = self._run.log_of(self._job.attempt, f"spare-{self._rank}")
            self._spare = Spare(invocation.argv, {**os.environ, **invocation.env}, log_path, shield.needed(os.environ))
        return self._spare

    def _expires_at(self) -> float | None:
        endpoint = self._run.endpoint()
        return endpoint.expires_at if endpoint else None

    def _engine(self, member: Member) -> Supervised:
        place = Place(self._record.address, self._record.port_base)
        buses = self._examination.buses
        mine = tuple(buses[slot] for slot in member.slots if slot < len(buses))
        told = fabric.environment(self._examination.snapshot, self._recipe.cluster, self._record.address, mine)
        told = fabric.unless_told(told, os.environ)
        invocation = commands.engine(
            self._recipe.of(member.model), member, self._run.path, place, self._devices(), told, self._staging.path
        )
        together = None
        if member.nodes > 1:
            others = self._plan.members_of(member.engine)
            changed = functools.partial(self._note_generation, member.name)
            together = Together(self._run, self._job.attempt, others, member, changed)
            self._together[member.name] = together
        # Ray's processes are not ours, and would not be told who sent a signal.
        shielded = role_of(self._recipe, member).executor is not Executor.RAY
        return self._child(member.name, invocation, self._recipe.engine.ready_timeout_s, together, shielded)

    def _devices(self) -> tuple[str, ...] | None:
        """The GPUs that this rank was given, as CUDA counts or names them; None when nobody restricted them."""
        if self._job.launcher in (Launcher.LOCAL, Launcher.DEBUG):
            return hosts.node_devices(hosts.devices_here(), self._rank, self._plan.slots_per_node) or None
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return tuple(given.split(",")) if given else None

    def _child(
        self,
        name: str,
        invocation: commands.Invocation,
        ready_timeout_s: float,
        together: Together | None = None,
        shielded: bool = True,
        spare: Spare | None = None,
    ) -> Supervised:
        return self._supervise(
            Command(
                name=name,
                argv=invocation.argv,
                env={**os.environ, **invocation.env},
                log_path=self._run.log_of(self._job.attempt, name),
                ready_timeout_s=ready_timeout_s,
                stop_grace_s=self._recipe.engine.drain_s + 15,  # its own drain, and the engine's shutdown after it
                shielded=shielded and shield.needed(os.environ),
            ),
            together,
            spare,
        )

    def _supervise(self, command: Command, together: Together | None = None, spare: Spare | None = None) -> Supervised:
        item = Supervised(command, self._note_and_save, together, spare)
        self._supervised.append(item)
        return item

    # --- what this node and the way to the others are like ----------------------------------------------------------

    def _address(self) -> str:
        """What this node gives to others, by the profile's interface or subnet, or else by its name."""
        cluster = self._recipe.cluster
        if cluster.interface is None and cluster.subnet is None:
            return hosts.address(cluster.hostname_suffix)
        return str(fabric.address(self._examination.snapshot, cluster).address)

    async def _only_preflight(self) -> None:
        """Test, tell, and end."""
        async with asyncio.TaskGroup() as group:
            heartbeat = group.create_task(self._heartbeat(), name="heartbeat")
            watch = group.create_task(self._watch_stop_file(), name="stop file")
            group.create_task(self._examination.offer(), name="offer")
            await self._examination.examine()
            heartbeat.cancel()
            watch.cancel()

    async def _watch_stop_file(self) -> None:
        """Where nobody oversees the deployment: heed what asks for its end."""
        await self._wait_for(self._run.stop_file.exists, math.inf)
        self._stop.set()

    # --- what the other ranks say ---------------------------------------------------------------------------------

    async def _wait_for_control(self) -> None:
        if not await self._wait_for(self._control_published, self._recipe.engine.ready_timeout_s, unless_stopped=True):
            raise DeploymentError("rank 0 did not publish the control plane: see its log")

    def _control_published(self) -> bool:
        found = self._run.control()
        return found is not None and found.attempt == self._job.attempt

    async def _wait_for_rank(self, rank: int) -> None:
        def there() -> bool:
            return self._run.rank(self._job.attempt, rank) is not None

        if not await self._wait_for(there, self._recipe.engine.ready_timeout_s, unless_stopped=True):
            raise DeploymentError(f"rank {rank} did not start: see {self._run.logs(self._job.attempt)}")

    async def _wait_for(
        self, condition: Callable[[], bool], timeout_s: float, unless_stopped: bool = False, poll_s: float = POLL_S
    ) -> bool:
        """Poll until the condition holds; a stop also ends the wait (as if it held) when `unless_stopped`."""
        deadline = time.monotonic() + timeout_s
        while not _holds(condition):
            if unless_stopped and self._stop.is_set():
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(poll_s)
        return True

    def _record_of(self, rank: int) -> RankRecord | None:
        return self._run.rank(self._job.attempt, rank)

    def _is_head(self) -> bool:
        """Whether this rank leads, as the run directory says."""
        return self._run.head(self._job.attempt).rank == self._rank

    def _left(self, done: Callable[[RankRecord], bool], ranks: Sequence[int] | None = None) -> list[int]:
        """The other ranks that are not done, those left out that have ended or are lost."""
        found = self._run.ranks(self._job.attempt)
        lost = self._lost_of(found)
        others = {rank: record for rank, record in found.items() if rank != self._rank and rank not in lost}
        return [
            rank
            for rank, record in others.items()
            if not (record.ended or done(record)) and (ranks is None or rank in ranks)
        ]

    def _frontends_drained(self) -> bool:
        return not self._left(lambda record: record.drained, self._control_ranks)

    def _all_quiet(self) -> bool:
        return not self._left(lambda record: record.quiet)

    def _others_running(self) -> list[int]:
        return self._left(lambda record: False)

    def _has_ended(self, member: Member) -> bool:
        """Whether nothing is left of a member of another rank."""
        rank = self._run.rank(self._job.attempt, member.rank)
        if rank is None or rank.ended:
            return True
        record = rank.members.get(member.name)
        return record is not None and record.state in (State.STOPPED, State.FAILED)

    def _refuse_loopback(self) -> None:
        """Refuse an address that the head's node cannot reach.

        Raises:
            LaunchError: The ranks are on different hosts, and one of the two gives a loopback address.
        """
        head = self._record_of(self._run.head(self._job.attempt).rank)
        if head is not None:
            here, there = (self._record.host, self._record.address), (head.host, head.address)
            hosts.refuse_loopback(here, there)

    async def _follow_head(self) -> None:
        """End with the head: when it was asked to stop, when it has ended.

        Raises:
            DeploymentError: It did not start in time, or has not been heard for a long time and nobody has taken over.
        """
        clock = AwakeClock()  # a pause of this rank is not the head's silence
        heard, last, allowed_s = clock.now, (0, 0.0), self._recipe.engine.ready_timeout_s
        head = Head(attempt=self._job.attempt, rank=0, term=0)
        while True:
            clock.tick()
            with contextlib.suppress(OSError):  # the shared file system has a bad moment: look again
                head = self._run.head(self._job.attempt)
                record = self._record_of(head.rank)
                self._heard.look({head.rank: record} if record else {})
                if record and (head.term, record.heartbeat) != last:
                    heard, last, allowed_s = clock.now, (head.term, record.heartbeat), LOST_HEAD_S
                led = record if head.rank != self._rank else None
                if self._run.stop_file.exists() or (led and (led.drained or led.ended)):
                    self._stop.set()
            if clock.now - heard > allowed_s and not self._stop.is_set() and head.rank != self._rank:
                nobody = " and no other rank took over" if len(self._control_ranks) > 1 else ""
                raise DeploymentError(f"rank {head.rank}, the head, was not heard for {allowed_s:.0f} s{nobody}")
            await asyncio.sleep(POLL_S)

    # --- what this rank says --------------------------------------------------------------------------------------

    async def _heartbeat(self) -> None:
        while True:
            self._save()
            await asyncio.sleep(HEARTBEAT_S)

    def _note_and_save(self, name: str, state: State, pid: int, detail: str) -> None:
        self._note(name, state, pid, detail)
        self._save()

    def _note(self, name: str, state: State, pid: int, detail: str) -> None:
        before = self._record.members.get(name)
        restarts = before.restarts if before else 0
        if state is State.RESTARTING:
            restarts += 1
        if before is None or before.state is not state:
            log.info("%s is %s%s", name, state, f": {detail}" if detail else "")
        record = MemberRecord(state=state, since=time.time(), pid=pid, restarts=restarts, detail=detail)
        together = self._together.get(name)
        if together:
            record.generation, record.asked = together.generation, together.asked
        self._record.members[name] = record

    def _note_staging(self, detail: str) -> None:
        """How far the model is on its way to this node, beside each member that waits for it."""
        for member in self._plan.on(self._rank):
            record = self._record.members[member.name]
            if record.detail != detail:
                self._record.members[member.name] = msgspec.structs.replace(record, detail=detail)
        self._save()

    def _note_generation(self, name: str) -> None:
        record, together = self._record.members[name], self._together[name]
        record.generation, record.asked = together.generation, together.asked
        self._save()

    def _save(self) -> None:
        """Write the record; a file system that is full or away must not end what serves."""
        self._record.heartbeat = time.time()
        try:
            self._run.put_rank(self._record)
        except OSError as error:
            if not self._unwritten:
                log.warning("the record of rank %d cannot be written: %s", self._rank, error)
            self._unwritten = True
        else:
            self._unwritten = False


def own_step(environ: Mapping[str, str]) -> str:
    """Slurm's name of the step that this process is a task of, or nothing."""
    if "SLURM_STEP_ID" not in environ or environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return ""
    return f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"


def process_age_s() -> float:
    """Seconds since this process was started, by the kernel's clock."""
    ticks = children.born(os.getpid()) or 0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _holds(condition: Callable[[], bool]) -> bool:
    """Whether it holds; not known, so not, while the shared file system has a bad moment."""
    with contextlib.suppress(OSError):
        return condition()
    return False


async def _all_stopped(items: Sequence[Supervised]) -> None:
    await asyncio.gather(*(item.stop() for item in items))


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _leads_still(headship: Headship, term: int) -> bool:
    return headship.leads and headship.term == term


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


def _innermost(error: BaseException) -> BaseException:
    """The first single error in a tree of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
