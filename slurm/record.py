"""What a rank says of itself and of its members, in `ranks/<rank>.json`: written anew at every change, and every 2 s."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping

import msgspec

from launch.records import MemberRecord, RankRecord, State
from slurm import children
from slurm.rank import Rank

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0


class OwnRecord:
    """The record of this rank: `said` is what it says, once `save` has written it."""

    def __init__(self, rank: Rank) -> None:
        self.said = RankRecord(
            attempt=rank.attempt,
            rank=rank.number,
            host=socket.gethostname(),
            address="",
            port_base=0,
            pid=os.getpid(),
            born=children.born(os.getpid()) or 0,
            heartbeat=time.time(),
            members={},
            step=own_step(os.environ),
        )
        self._run = rank.run
        self._unwritten = False

    async def heartbeat(self) -> None:
        """Say every while that this rank lives; for ever."""
        while True:
            self.save()
            await asyncio.sleep(HEARTBEAT_S)

    def tell(self, name: str, state: State, pid: int, detail: str) -> None:
        """Say at once what a member is now."""
        self.note(name, state, pid, detail)
        self.save()

    def note(self, name: str, state: State, pid: int = 0, detail: str = "") -> None:
        """Say with the next word what a member is now."""
        before = self.said.members.get(name)
        if before is None or before.state is not state:
            log.info("%s is %s%s", name, state, f": {detail}" if detail else "")
        record = MemberRecord(state=state, since=time.time(), pid=pid, detail=detail)
        if before:
            record.restarts = before.restarts
            record.generation, record.asked = before.generation, before.asked
        if state is State.RESTARTING:
            record.restarts += 1
        self.said.members[name] = record

    def tell_detail(self, names: Iterable[str], detail: str) -> None:
        """Say at once how far members are, in the state that they are in."""
        for name in names:
            record = self.said.members[name]
            if record.detail != detail:
                self.said.members[name] = msgspec.structs.replace(record, detail=detail)
        self.save()

    def tell_generation(self, name: str, generation: int, asked: int) -> None:
        """Say at once which life of its engine a member is in, and which one it asks for (`slurm.together`)."""
        record = self.said.members[name]
        record.generation, record.asked = generation, asked
        self.save()

    def save(self) -> None:
        """Write the record; a file system that is full or away must not end what serves."""
        self.said.heartbeat = time.time()
        try:
            self._run.put_rank(self.said)
        except OSError as error:
            if not self._unwritten:
                log.warning("the record of rank %d cannot be written: %s", self.said.rank, error)
            self._unwritten = True
        else:
            self._unwritten = False


def own_step(environ: Mapping[str, str]) -> str:
    """Slurm's name of the step that this process is a task of, or nothing."""
    if "SLURM_STEP_ID" not in environ or environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return ""
    return f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
