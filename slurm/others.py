"""The other ranks, as this one knows them from the run directory: who leads, who is there, who has ended, who is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from launch.errors import DeploymentError
from launch.plan import Member
from launch.records import Head, RankRecord, State
from launch.standby import control_ranks
from slurm import hosts
from slurm.heard import Heard
from slurm.rank import POLL_S, Rank, holds
from workers.runtime.awake import AwakeClock

log = logging.getLogger(__name__)

LOST_HEAD_S = 60.0


class Others:
    """What the other ranks say. `control` are the ranks that may lead, and `heard` is when each was heard last."""

    def __init__(self, rank: Rank) -> None:
        self.control = control_ranks(rank.recipe, rank.job.launcher)
        self.heard = Heard()
        self._rank = rank
        self._run = rank.run

    # --- who leads --------------------------------------------------------------------------------------------------

    @property
    def led_from_here(self) -> bool:
        """Whether this rank is the head, as the run directory says; not while that cannot be read."""
        return holds(self.is_head)

    def is_head(self) -> bool:
        """Whether this rank is the head, as the run directory says."""
        return self._run.head(self._rank.attempt).rank == self._rank.number

    async def follow_head(self) -> None:
        """Set `stop` when the head was asked to stop, and when it has ended; for ever.

        Raises:
            DeploymentError: It did not start in time, or has not been heard for a long time and nobody has taken over.
        """
        stop, own = self._rank.stop, self._rank.number
        clock = AwakeClock()  # a pause of this rank is not the head's silence
        heard, last, allowed_s = clock.now, (0, 0.0), self._rank.recipe.engine.ready_timeout_s
        head = Head(attempt=self._rank.attempt, rank=0, term=0)
        while True:
            clock.tick()
            with contextlib.suppress(OSError):  # the shared file system has a bad moment: look again
                head = self._run.head(self._rank.attempt)
                record = self.record_of(head.rank)
                self.heard.look({head.rank: record} if record else {})
                if record and (head.term, record.heartbeat) != last:
                    heard, last, allowed_s = clock.now, (head.term, record.heartbeat), LOST_HEAD_S
                led = record if head.rank != own else None
                if self._run.stop_file.exists() or (led and (led.drained or led.ended)):
                    stop.set()
            if clock.now - heard > allowed_s and not stop.is_set() and head.rank != own:
                nobody = " and no other rank took over" if len(self.control) > 1 else ""
                raise DeploymentError(f"rank {head.rank}, the head, was not heard for {allowed_s:.0f} s{nobody}")
            await asyncio.sleep(POLL_S)

    async def wait_for_control(self) -> None:
        """Wait until the control plane serves, or the end was asked for.

        Raises:
            DeploymentError: It does not in time.
        """
        limit_s = self._rank.recipe.engine.ready_timeout_s
        if not await self._rank.wait_for(self.control_published, limit_s, unless_stopped=True):
            raise DeploymentError("rank 0 did not publish the control plane: see its log")

    def control_published(self) -> bool:
        """Whether the control plane of this attempt serves."""
        found = self._run.control()
        return found is not None and found.attempt == self._rank.attempt

    # --- who is there -----------------------------------------------------------------------------------------------

    def record_of(self, rank: int) -> RankRecord | None:
        """The last word of a rank."""
        return self._run.rank(self._rank.attempt, rank)

    async def wait_for_rank(self, rank: int) -> None:
        """Wait until a rank has begun, or the end was asked for.

        Raises:
            DeploymentError: It does not in time.
        """
        limit_s = self._rank.recipe.engine.ready_timeout_s
        if not await self._rank.wait_for(lambda: self.record_of(rank) is not None, limit_s, unless_stopped=True):
            raise DeploymentError(f"rank {rank} did not start: see {self._run.logs(self._rank.attempt)}")

    def refuse_loopback(self, own: RankRecord) -> None:
        """Refuse an address that the head's node cannot reach.

        Raises:
            LaunchError: The ranks are on different hosts, and one of the two gives a loopback address.
        """
        head = self.record_of(self._run.head(self._rank.attempt).rank)
        if head is not None:
            hosts.refuse_loopback((own.host, own.address), (head.host, head.address))

    # --- who has ended ----------------------------------------------------------------------------------------------

    @property
    def lost(self) -> list[int]:
        """Ranks that ended without a word, as far as is known."""
        try:
            return self._lost_of(self._run.ranks(self._rank.attempt))
        except OSError:
            return []

    def has_ended(self, member: Member) -> bool:
        """Whether nothing is left of a member of another rank."""
        rank = self.record_of(member.rank)
        if rank is None or rank.ended:
            return True
        record = rank.members.get(member.name)
        return record is not None and record.state in (State.STOPPED, State.FAILED)

    def frontends_drained(self) -> bool:
        """Whether no frontend of another rank has anything left to finish."""
        return not self._left(lambda record: record.drained, self.control)

    def all_quiet(self) -> bool:
        """Whether nothing is left of the members of other ranks."""
        return not self._left(lambda record: record.quiet)

    def all_ended(self) -> bool:
        """Whether nothing is left of other ranks."""
        return not self._left(lambda record: False)

    def _left(self, done: Callable[[RankRecord], bool], ranks: Sequence[int] | None = None) -> list[int]:
        """The other ranks (of these) that are not done, without those that have ended or are lost."""
        found = self._run.ranks(self._rank.attempt)
        lost = self._lost_of(found)
        others = {rank: record for rank, record in found.items() if rank != self._rank.number and rank not in lost}
        return [
            rank
            for rank, record in others.items()
            if not (record.ended or done(record)) and (ranks is None or rank in ranks)
        ]

    def _lost_of(self, ranks: Mapping[int, RankRecord]) -> list[int]:
        endpoint = self._run.endpoint()
        self.heard.look(ranks)
        told = endpoint.lost if endpoint else []
        return sorted({*self.heard.lost(ranks), *(rank for rank in told if rank in ranks and not ranks[rank].ended)})
