"""All children of a rank: how each kind is started and kept, and the end of all of them at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

from slurm import shield
from slurm.commands import Invocation
from slurm.rank import Rank
from slurm.record import OwnRecord
from slurm.spare import Spare
from slurm.supervise import Command, Supervised
from slurm.together import Together
from workers.control.servers import Server

SERVER_READY_S = 60.0
# What they hold is disposable, and KillWait is short: an etcd that looks for another to lead, while all of them end, would take
# half of it.
SERVER_STOP_S = 2.0
# After a member's own drain, for the shutdown of its engine.
SHUTDOWN_S = 15.0


class Supervisor:
    """Makes the supervised children of a rank; its record tells how they are."""

    def __init__(self, rank: Rank, record: OwnRecord) -> None:
        self._rank = rank
        self._record = record
        self._all: list[Supervised] = []

    def server(self, server: Server) -> Supervised:
        """A server of the control plane."""
        return self._supervised(
            Command(
                name=server.name,
                argv=server.argv,
                env=os.environ,
                log_path=self._rank.run.log_of(self._rank.attempt, server.name),
                ready_timeout_s=SERVER_READY_S,
                stop_grace_s=SERVER_STOP_S,
                ready=server.ready,
                folder=server.folder,
            )
        )

    def member(
        self,
        name: str,
        invocation: Invocation,
        ready_timeout_s: float,
        together: Together | None = None,
        shielded: bool = True,
        spare: Spare | None = None,
    ) -> Supervised:
        """An engine member or a frontend, which says itself how it is."""
        return self._supervised(
            Command(
                name=name,
                argv=invocation.argv,
                env={**os.environ, **invocation.env},
                log_path=self._rank.run.log_of(self._rank.attempt, name),
                ready_timeout_s=ready_timeout_s,
                stop_grace_s=self._rank.recipe.engine.drain_s + SHUTDOWN_S,
                shielded=shielded and shield.needed(os.environ),
            ),
            together,
            spare,
        )

    def kill(self) -> None:
        """End every child at once."""
        for item in self._all:
            item.kill()

    def _supervised(self, command: Command, together: Together | None = None, spare: Spare | None = None) -> Supervised:
        item = Supervised(command, self._record.tell, together, spare)
        self._all.append(item)
        return item


async def all_stopped(items: Iterable[Supervised]) -> None:
    """Stop them, gracefully and at the same time."""
    await asyncio.gather(*(item.stop() for item in items))
