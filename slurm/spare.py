"""A spare: a process that has done what a frontend's start takes long for, and waits to be told whose place it takes.

Python's imports are most of that start (0.7 s of CPU time, seconds where other processes want the same cores), and no name
is needed for them. So the agent that runs the frontends keeps one process beside them that has imported everything. When a
frontend dies the spare becomes it, and the next spare is started a little later, out of the way of the one that begins to
serve. A fork of a waiting process was weighed: it is no child of the agent's, and what has threads and loops must not fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from slurm.children import Child, Report, start

log = logging.getLogger(__name__)

# Not at once: a deployment that starts, or a frontend that takes its place, wants the cores for itself.
AFTER_S = 5.0
# When it cannot be kept alive.
AGAIN_S = 30.0
STOP_S = 2.0


class Place(msgspec.Struct):
    """Whose place a spare takes, and where it writes its log."""

    name: str
    log_path: str


class Spare:
    """The agent's side: keeps one spare and gives it away."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], log_path: Path, shielded: bool, after_s: float = AFTER_S
    ) -> None:
        """`argv` starts a process that calls `wait_for_place`; its output goes to `log_path` until then."""
        self._argv = argv
        self._env = env
        self._log_path = log_path
        self._shielded = shielded
        self._after_s = after_s
        self._waiting: _Waiting | None = None

    @property
    def pid(self) -> int | None:
        """The process that waits now, if there is one."""
        return self._waiting.child.pid if self._waiting else None

    async def keep(self) -> None:
        """Have one, for ever; cancelled, it ends the one that waits."""
        while True:
            await asyncio.sleep(self._after_s)
            try:
                waiting = await self._start()
            except OSError as error:
                log.warning("no spare frontend could be started: %s", error)
                await asyncio.sleep(AGAIN_S)
                continue
            try:
                if not await waiting.over():
                    log.warning("the spare frontend ended by itself; the end of its log:\n%s", waiting.child.tail())
            finally:
                self._waiting = None
                await asyncio.shield(asyncio.ensure_future(waiting.close()))
            if not waiting.given:
                await asyncio.sleep(AGAIN_S)

    def take(self, name: str, log_path: Path, on_report: Callable[[Report], None]) -> Child | None:
        """The spare, which is now the child of that name; None when there is none just now."""
        waiting, self._waiting = self._waiting, None
        return waiting.give(name, log_path, on_report) if waiting else None

    async def _start(self) -> _Waiting:
        read_end, write_end = os.pipe()
        waiting = _Waiting(write_end)
        try:
            waiting.child = await start(
                "spare", self._argv, self._env, self._log_path, waiting.reported, None, self._shielded, stdin=read_end
            )
        except OSError:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        self._waiting = waiting
        return waiting


class _Waiting:
    """One spare process, until it is given away."""

    child: Child

    def __init__(self, told_by: int) -> None:
        self.given = False
        self._told_by = told_by
        self._gave = asyncio.Event()
        self._on_report: Callable[[Report], None] | None = None

    def reported(self, report: Report) -> None:
        if self._on_report:
            self._on_report(report)

    def give(self, name: str, log_path: Path, on_report: Callable[[Report], None]) -> Child | None:
        if self.child.ended:
            return None
        self._on_report = on_report
        with contextlib.suppress(BrokenPipeError):  # it dies in this moment: that is seen as the child's death
            os.write(self._told_by, msgspec.json.encode(Place(name, str(log_path))) + b"\n")
        self.child.name, self.child.log_path = name, log_path
        self.given = True
        self._gave.set()
        return self.child

    async def over(self) -> bool:
        """Wait until it is given away, which returns True, or has ended."""
        gave, ended = asyncio.ensure_future(self._gave.wait()), asyncio.ensure_future(self.child.wait())
        try:
            await asyncio.wait((gave, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gave.cancel()
            ended.cancel()
        return self.given

    async def close(self) -> None:
        os.close(self._told_by)
        if not self.given:
            await self.child.stop(STOP_S)


def wait_for_place() -> str:
    """In the spare: wait until the agent gives it a place, and return the name; the agent's end is the end."""
    print("waiting", flush=True)
    line = sys.stdin.readline()
    if not line:
        raise SystemExit(0)
    place = msgspec.json.decode(line, type=Place)
    with open(place.log_path, "ab") as output, open(os.devnull, "rb") as nothing:
        sys.stdout.flush()
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    return place.name
