"""An engine over several ranks lives and dies as one.

vLLM (0.32) does not see to that: an idle node 0 does not notice that another node's workers are gone, and those stay for
ever when node 0 is. So the agents of an engine's ranks do, through their records in the run directory.

Each life of the engine is a *generation*. A member's record says which one it is in (of older ones nothing is left on its
node) and which one it asks for. A member that ends by itself asks for the next; the others see it, end theirs, and enter
it as well. Node 0 starts when all have entered, the others start once node 0's process runs. So nobody meets the
rendezvous of an earlier life, and a node that is lost keeps its engine waiting, and only that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from launch.plan import Member
from launch.records import SILENT_AFTER_S, MemberRecord, RankRecord, RunDirectory, State
from workers.runtime.awake import AwakeClock

POLL_S = 0.2
SETTLE_S = 1.0
GENERATION = "BATON_GENERATION"
RUNNING = (State.STARTING, State.LOADING, State.READY)


class Together:
    """What one member knows of the other members of its engine.

    `changed` is called when `generation` or `asked` is another: the record has to say so at once.
    """

    def __init__(
        self, run: RunDirectory, attempt: int, members: Sequence[Member], own: Member, changed: Callable[[], None]
    ) -> None:
        self.generation = 0
        self.asked = 0
        self.served = False
        self._run = run
        self._attempt = attempt
        self._own = own
        self._others = [member for member in members if member.name != own.name]
        self._head = members[0]
        self._changed = changed
        self._ranks: dict[int, RankRecord] = {}
        self._heard: dict[int, tuple[float, float]] = {}
        self._clock = AwakeClock()

    @property
    def leads(self) -> bool:
        """Whether this member is node 0 of its engine."""
        return self._own is self._head

    @property
    def environment(self) -> dict[str, str]:
        """What the member's process is told of its generation."""
        return {GENERATION: str(self.generation)}

    def ask(self) -> None:
        """Ask for the next generation: this one is over."""
        self._read()
        self.asked = max(self.generation + 1, self._newest())
        self._changed()

    async def may_start(self) -> None:
        """Enter the newest generation, and return when it is this member's turn to start."""
        while True:
            self._read()
            newest = self._newest()
            if self.generation != newest:
                self.generation = self.asked = newest
                self._changed()
            if self.leads:
                if all(self._entered(member) for member in self._others):
                    return
            elif self._entered(self._head) and self._runs(self._head):
                return
            await asyncio.sleep(POLL_S)

    async def broken(self) -> str:
        """Return, with the reason, when this generation is over because of another member.

        Not once this member has asked for the next itself: it is ending then, in its own way.
        """
        while True:
            self._read()
            for member in self._others:
                record = self._record(member)
                if record and record.asked > max(self.generation, self.asked):
                    return f"{member.name} ended"
                if self._lost(member.rank):
                    self.ask()
                    return f"{member.name} is lost with rank {member.rank}"
            await asyncio.sleep(POLL_S)

    async def settle(self) -> None:
        """After the end of this member: the time in which a stop of the whole deployment would reach its rank too."""
        await asyncio.sleep(SETTLE_S)
        self._read()

    def _newest(self) -> int:
        records = (self._record(member) for member in self._others)
        return max(self.asked, *(record.asked for record in records if record), 0)

    def _entered(self, member: Member) -> bool:
        record = self._record(member)
        return (
            record is not None and record.generation == record.asked == self.generation and not self._lost(member.rank)
        )

    def _runs(self, member: Member) -> bool:
        record = self._record(member)
        return record is not None and record.state in RUNNING and record.pid > 0

    def _record(self, member: Member) -> MemberRecord | None:
        rank = self._ranks.get(member.rank)
        return rank.members.get(member.name) if rank else None

    def _lost(self, rank: int) -> bool:
        """Whether a rank has ended, or was not heard for a while by our own clock, since those of nodes differ."""
        record = self._ranks.get(rank)
        if record is None:
            return False
        heartbeat, since = self._heard.get(rank, (0.0, 0.0))
        if heartbeat != record.heartbeat:
            since = self._clock.now
            self._heard[rank] = (record.heartbeat, since)
        return record.ended or self._clock.now - since > SILENT_AFTER_S

    def _read(self) -> None:
        self._clock.tick()
        for rank in {member.rank for member in self._others}:
            with contextlib.suppress(OSError):  # the shared file system has a bad moment: what was known stays known
                record = self._run.rank(self._attempt, rank)
                if record:
                    self._ranks[rank] = record
        head = self._record(self._head)
        self.served = self.served or (head is not None and head.state is State.READY)
