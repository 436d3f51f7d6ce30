"""The engine members of a rank: what each is started with, and the order in which they end."""

from __future__ import annotations

import asyncio
import functools
import os

from launch.plan import Member
from launch.recipe import Executor, Launcher
from launch.records import State
from slurm import commands, fabric, hosts
from slurm.examination import Examination
from slurm.extension import Departures
from slurm.others import Others
from slurm.places import Place
from slurm.rank import Rank
from slurm.record import OwnRecord
from slurm.staging import Staging
from slurm.supervise import Supervised
from slurm.supervisor import Supervisor, all_stopped
from slurm.together import Together
from workers.engine.arguments import role_of

# Seconds beyond its drain that an engine over several nodes gets to end on its first.
LEADER_GRACE_S = 20.0


class Engines:
    """The engine members that the plan gives a rank. `departures` are those that leave before the deployment ends."""

    def __init__(
        self,
        rank: Rank,
        record: OwnRecord,
        others: Others,
        supervisor: Supervisor,
        examination: Examination,
        staging: Staging,
        departures: Departures,
    ) -> None:
        self._rank = rank
        self._record = record
        self._others = others
        self._supervisor = supervisor
        self._examination = examination
        self._staging = staging
        self._departures = departures
        self._items: dict[Member, Supervised] = {}
        self._leaving: asyncio.Task[None] | None = None

    async def start(self, group: asyncio.TaskGroup) -> None:
        """Start them in this group, each once the rank of its engine's first node has begun.

        Raises:
            LaunchError: That rank did not start in time, or its node cannot reach this one.
        """
        for member in self._rank.plan.on(self._rank.number):
            await self._others.wait_for_rank(self._rank.plan.leader_of(member.engine).rank)
            self._others.refuse_loopback(self._record.said)
            if self._rank.stop.is_set():
                break
            if self._examination.left_out or self._departures.left(member.engine):
                self._record.note(member.name, State.STOPPED, 0, "left out")
                continue
            self._items[member] = self._supervised(member)
        for item in self._items.values():
            group.create_task(item.run(), name=item.command.name)
        by_name = {member.name: item for member, item in self._items.items()}
        self._leaving = group.create_task(self._departures.watch(by_name, self._rank.stop), name="departures")

    def expect_end(self) -> None:
        """From now on they may end by themselves."""
        for item in self._staying().values():
            item.expect_end()

    async def stop(self) -> None:
        """Let each withdraw, finish what runs, and end; returns when nothing is left of any, those that leave included."""
        staying = self._staying()
        await all_stopped(item for member, item in staying.items() if member.leader)
        followers = {member: item for member, item in staying.items() if not member.leader}
        for member in followers:
            # An engine finishes with all of its nodes: the others end after node 0 has.
            first = self._rank.plan.leader_of(member.engine)
            grace_s = self._rank.recipe.engine.drain_s + LEADER_GRACE_S
            await self._rank.wait_for(functools.partial(self._others.has_ended, first), grace_s)
        await all_stopped(followers.values())
        if self._leaving:
            await self._leaving

    def _staying(self) -> dict[Member, Supervised]:
        """Those that `departures` does not stop already."""
        return {member: item for member, item in self._items.items() if not self._departures.took(member.name)}

    def _supervised(self, member: Member) -> Supervised:
        recipe, said, snapshot = self._rank.recipe.of(member.model), self._record.said, self._examination.snapshot
        place = Place(said.address, said.port_base)
        buses = self._examination.buses
        mine = tuple(buses[slot] for slot in member.slots if slot < len(buses))
        told = fabric.unless_told(fabric.environment(snapshot, recipe.cluster, said.address, mine), os.environ)
        invocation = commands.engine(
            recipe, member, self._rank.run.path, place, devices(self._rank), told, self._staging.path
        )
        # Ray's processes are not ours, and would not be told who sent a signal.
        shielded = role_of(recipe, member).executor is not Executor.RAY
        together = self._together(member) if member.nodes > 1 else None
        return self._supervisor.member(member.name, invocation, recipe.engine.ready_timeout_s, together, shielded)

    def _together(self, member: Member) -> Together:
        def changed() -> None:
            self._record.tell_generation(member.name, together.generation, together.asked)

        rank = self._rank
        members = rank.plan.members_of(member.engine)
        together = Together(rank.run, rank.attempt, members, member, changed)
        return together


def devices(rank: Rank) -> tuple[str, ...] | None:
    """The GPUs that a rank was given, as CUDA counts or names them; None when nobody restricted them."""
    if rank.job.launcher in (Launcher.LOCAL, Launcher.DEBUG):
        return hosts.node_devices(hosts.devices_here(), rank.number, rank.plan.slots_per_node) or None
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(given.split(",")) if given else None
