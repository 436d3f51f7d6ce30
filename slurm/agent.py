"""The agent: one for each rank. It claims the rank's ports, starts the members that the plan gives it, keeps them running,
tells the run directory how they are, and ends them in order.

Rank 0's agent also runs the control plane and the frontends, and publishes the state of the whole deployment.

Ending, in order: frontends stop admitting and finish what runs; then engines withdraw and stop, on all ranks; then, when
the other ranks have ended, the control plane.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import zmq

from launch.errors import DeploymentError, LaunchError
from launch.plan import ETCD_PORT, NATS_PORT, Member, Plan, plan
from launch.recipe import Launcher, Recipe
from launch.records import Control, Job, MemberRecord, RankRecord, RunDirectory, State
from slurm import children, commands, fabric, hosts, limit, ports, signals
from slurm.batch import notice_s
from slurm.examination import Examination
from slurm.overseer import Overseer
from slurm.places import Place
from slurm.staging import Staging
from slurm.supervise import Command, Supervised
from slurm.together import Together
from workers.control import servers
from workers.control.certificates import Certificates, issue
from workers.runtime.awake import AwakeClock

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
POLL_S = 0.2
SERVER_READY_S = 60.0
FRONTEND_READY_S = 60.0
LOST_RANK0_S = 60.0


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
    where = plan(recipe)
    agents.extend(Agent(run, recipe, where, job, rank, stop) for rank in ranks)
    watch = asyncio.create_task(_stop_before_the_limit(recipe, job, 0 in ranks, notice, stop), name="limit")
    results = await asyncio.gather(*(agent.run(job_key) for agent in agents), return_exceptions=True)
    watch.cancel()
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
    recipe: Recipe, job: Job, rank0: bool, notice: asyncio.Event, stop: asyncio.Event
) -> None:
    """After Slurm's notice, set `stop` when what runs can still finish before the time limit, and not before.

    The notice comes up to a minute early, and the limit may be moved: so the time is asked for, by rank 0 for all.
    """
    await notice.wait()
    if not rank0:
        return  # rank 0 decides for all: see `Agent._watch_rank0`
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
        self._together: dict[str, Together] = {}
        self._unwritten = False
        self._ends_at: float | None = None
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
        self._examination = Examination(
            run, recipe, where, job.launcher, self._record, self._devices(), self._wait_for, stop
        )
        self._staging = Staging(run, recipe, where, self._record, os.environ, self._wait_for, stop, self._note_staging)

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
                    ]
                    if self._rank == 0:
                        overseer = Overseer(self._run, self._recipe, self._plan, self._job, self._stop)
                        async with self._control_plane(group), overseer.published() as endpoint:
                            self._ends_at = endpoint.expires_at
                            background.append(group.create_task(overseer.watch(), name="overseer"))
                            await self._members(group)
                    else:
                        background.append(group.create_task(self._watch_rank0(), name="rank0"))
                        await self._members(group)
                    for task in background:
                        task.cancel()
            except* (LaunchError, OSError) as errors:
                raise _innermost(errors) from None

    async def _members(self, group: asyncio.TaskGroup) -> None:
        """Frontends (rank 0) and engine members, from their start to their end."""
        await self._wait_for_control()
        limit_s = self._recipe.engine.ready_timeout_s + 2 * self._recipe.preflight.timeout_s
        if not await self._wait_for(self._examination.sound.is_set, limit_s, unless_stopped=True):
            raise DeploymentError(f"the preflight of rank {self._rank} did not end: see its log")
        await self._staging.run()
        frontends = [self._frontend(name) for name in self._plan.frontends] if self._rank == 0 else []
        leaders: list[Supervised] = []
        followers: list[tuple[Member, Supervised]] = []
        for member in self._plan.on(self._rank):
            await self._wait_for_rank(self._plan.leader_of(member.engine).rank)
            self._refuse_loopback()
            if self._stop.is_set():
                break
            item = self._engine(member)
            if member.leader:
                leaders.append(item)
            else:
                followers.append((member, item))
        for item in (*frontends, *leaders, *(item for _, item in followers)):
            group.create_task(item.run(), name=item.command.name)
        await self._stop.wait()
        for item in (*leaders, *(item for _, item in followers)):
            item.expect_end()
        if self._rank == 0:
            await _all_stopped(frontends)
            self._record.drained = True
            self._save()
        else:
            await self._wait_for(self._rank0_drained, self._recipe.engine.drain_s + 5)
        await _all_stopped(leaders)
        for member, _ in followers:
            # An engine finishes with all of its nodes: the others end after node 0 has.
            head = self._plan.leader_of(member.engine)
            await self._wait_for(functools.partial(self._has_ended, head), self._recipe.engine.drain_s + 20)
        await _all_stopped([item for _, item in followers])
        self._record.drained = True

    @contextlib.asynccontextmanager
    async def _control_plane(self, group: asyncio.TaskGroup) -> AsyncIterator[None]:
        """NATS and etcd, serving and published within the block; they end after the other ranks."""
        certificates = issue(self._record.address)
        folder = self._run.path / "control"
        control = self._new_control(certificates, servers.client_file(certificates, folder))
        nats = servers.nats(control, servers.find_nats(self._recipe.control.nats_server), folder / "nats")
        etcd = servers.etcd(
            control,
            certificates,
            servers.find_etcd(self._recipe.control.etcd),
            folder / f"etcd-{self._job.attempt}",
        )
        running = [self._server(server) for server in (nats, etcd)]
        tasks = [group.create_task(item.run(), name=item.command.name) for item in running]
        for item in running:
            await item.first_ready.wait()
        self._record.control_ready_s = round(time.monotonic() - self._started, 3)
        log.info("control plane ready %.2f s after the agent's start", self._record.control_ready_s)
        self._run.put_control(control)
        self._save()
        yield
        grace = self._recipe.engine.drain_s + 15
        if any(not member.leader for member in self._plan.members):
            grace *= 2  # followers end after their leaders
        await self._wait_for(lambda: not self._others_running(), grace)
        await _all_stopped(running)
        await asyncio.gather(*tasks)

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
        invocation = commands.frontend(name, self._run.path, self._ends_at)
        return self._child(name, invocation, FRONTEND_READY_S)

    def _engine(self, member: Member) -> Supervised:
        place = Place(self._record.address, self._record.port_base)
        buses = self._examination.buses
        mine = tuple(buses[slot] for slot in member.slots if slot < len(buses))
        told = fabric.environment(self._examination.snapshot, self._recipe.cluster, self._record.address, mine)
        told = fabric.unless_told(told, os.environ)
        invocation = commands.engine(
            self._recipe, member, self._run.path, place, self._devices(), told, self._staging.path
        )
        together = None
        if member.nodes > 1:
            others = self._plan.members_of(member.engine)
            changed = functools.partial(self._note_generation, member.name)
            together = Together(self._run, self._job.attempt, others, member, changed)
            self._together[member.name] = together
        return self._child(member.name, invocation, self._recipe.engine.ready_timeout_s, together)

    def _devices(self) -> tuple[str, ...] | None:
        """The GPUs that this rank was given, as CUDA counts or names them; None when nobody restricted them."""
        if self._job.launcher in (Launcher.LOCAL, Launcher.DEBUG):
            return hosts.node_devices(hosts.devices_here(), self._rank, self._plan.slots_per_node) or None
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return tuple(given.split(",")) if given else None

    def _child(
        self, name: str, invocation: commands.Invocation, ready_timeout_s: float, together: Together | None = None
    ) -> Supervised:
        return self._supervise(
            Command(
                name=name,
                argv=invocation.argv,
                env={**os.environ, **invocation.env},
                log_path=self._run.log_of(self._job.attempt, name),
                ready_timeout_s=ready_timeout_s,
                stop_grace_s=self._recipe.engine.drain_s + 15,  # its own drain, and the engine's shutdown after it
            ),
            together,
        )

    def _supervise(self, command: Command, together: Together | None = None) -> Supervised:
        item = Supervised(command, self._note_and_save, together)
        self._supervised.append(item)
        return item

    def _new_control(self, certificates: Certificates, client_file: Path) -> Control:
        address, base = self._record.address, self._record.port_base
        worker, frontend = ([key.decode() for key in zmq.curve_keypair()] for _ in range(2))
        return Control(
            attempt=self._job.attempt,
            nats_url=f"nats://{address}:{base + NATS_PORT}",
            nats_user="baton",
            nats_password=secrets.token_urlsafe(24),
            etcd_url=f"https://{address}:{base + ETCD_PORT}",
            etcd_user="root",
            etcd_password=secrets.token_urlsafe(24),
            worker_public=worker[0],
            worker_secret=worker[1],
            frontend_public=frontend[0],
            frontend_secret=frontend[1],
            etcd_authority=certificates.authority,
            etcd_client_file=str(client_file),
        )

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
        def published() -> bool:
            control = self._run.control()
            return control is not None and control.attempt == self._job.attempt

        if not await self._wait_for(published, self._recipe.engine.ready_timeout_s, unless_stopped=True):
            raise DeploymentError("rank 0 did not publish its control plane: see its log")

    async def _wait_for_rank(self, rank: int) -> None:
        def there() -> bool:
            return self._run.rank(self._job.attempt, rank) is not None

        if not await self._wait_for(there, self._recipe.engine.ready_timeout_s, unless_stopped=True):
            raise DeploymentError(f"rank {rank} did not start: see {self._run.logs(self._job.attempt)}")

    async def _wait_for(self, condition: Callable[[], bool], timeout_s: float, unless_stopped: bool = False) -> bool:
        """Poll until the condition holds; a stop also ends the wait (as if it held) when `unless_stopped`."""
        deadline = time.monotonic() + timeout_s
        while not _holds(condition):
            if unless_stopped and self._stop.is_set():
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True

    def _rank0_drained(self) -> bool:
        rank0 = self._run.rank(self._job.attempt, 0)
        return rank0 is None or rank0.drained or rank0.ended

    def _others_running(self) -> list[int]:
        ranks = self._run.ranks(self._job.attempt)
        return [rank for rank, record in ranks.items() if rank != self._rank and not record.ended]

    def _has_ended(self, member: Member) -> bool:
        """Whether nothing is left of a member of another rank."""
        rank = self._run.rank(self._job.attempt, member.rank)
        if rank is None or rank.ended:
            return True
        record = rank.members.get(member.name)
        return record is not None and record.state in (State.STOPPED, State.FAILED)

    def _refuse_loopback(self) -> None:
        """Refuse an address that rank 0's node cannot reach.

        Raises:
            LaunchError: The ranks are on different hosts, and one of the two gives a loopback address.
        """
        rank0 = self._run.rank(self._job.attempt, 0)
        if rank0 is not None:
            here, there = (self._record.host, self._record.address), (rank0.host, rank0.address)
            hosts.refuse_loopback(here, there)

    async def _watch_rank0(self) -> None:
        """End with rank 0: when it was asked to stop, when it has ended.

        Raises:
            DeploymentError: It did not start in time, or has not been heard for a long time.
        """
        clock = AwakeClock()  # a pause of this rank is not rank 0's silence
        heard, last, allowed_s = clock.now, 0.0, self._recipe.engine.ready_timeout_s
        while True:
            clock.tick()
            with contextlib.suppress(OSError):  # the shared file system has a bad moment: look again
                rank0 = self._run.rank(self._job.attempt, 0)
                if rank0 and rank0.heartbeat != last:
                    heard, last, allowed_s = clock.now, rank0.heartbeat, LOST_RANK0_S
                if self._run.stop_file.exists() or (rank0 and (rank0.drained or rank0.ended)):
                    self._stop.set()
            if clock.now - heard > allowed_s and not self._stop.is_set():
                raise DeploymentError(f"rank 0 was not heard for {allowed_s:.0f} s")
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


def _innermost(error: BaseException) -> BaseException:
    """The first single error in a tree of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
