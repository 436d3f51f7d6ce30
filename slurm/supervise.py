"""Keep one child running: start it, wait until it is ready, start it again when it dies, stop it when asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import ChildError, DeploymentError, only
from launch.records import State
from slurm.children import Child, Report, start
from slurm.spare import Spare
from slurm.together import Together

log = logging.getLogger(__name__)

BACK_OFF_S = (0.1, 1.0, 2.0, 5.0, 10.0, 30.0)
CALM_S = 60.0
# A member whose engine broke elsewhere has nothing to finish: it gets this long to withdraw.
BROKEN_GRACE_S = 1.0


class BrokenError(Exception):
    """Another member of the same engine has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to run, and how to know that it serves: by `ready`, or else by the child's own report.

    `folder` is where it runs; None for where the agent does. `shielded`: see `slurm.shield`.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log_path: Path
    ready_timeout_s: float
    stop_grace_s: float
    ready: Callable[[], Awaitable[None]] | None = None
    folder: Path | None = None
    shielded: bool = False


class Supervised:
    """One supervised child. A death before it was ever ready is an error; any later one is repaired.

    With `together` the child is a member of an engine over several ranks: it starts and ends with the others, and "ready"
    is when the engine serves. With `spare` a process that waits takes the place of one that died.
    """

    def __init__(
        self,
        command: Command,
        on_state: Callable[[str, State, int, str], None],
        together: Together | None = None,
        spare: Spare | None = None,
    ) -> None:
        self.command = command
        self.first_ready = asyncio.Event()
        self._on_state = on_state
        self._together = together
        self._spare = spare
        self._broken: str | None = None
        self._ending = False
        self._child: Child | None = None
        self._ready = asyncio.Event()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Run the child until `stop`.

        Raises:
            ChildError: It died before it was ready for the first time.
            DeploymentError: It was not ready in time the first time.
            OSError: It could not be started at all.
        """
        deaths = 0
        while not self._stopping.is_set() and await self._admitted():
            started = asyncio.get_running_loop().time()
            try:
                await self._run_once()
                break  # it was asked to stop
            except BrokenError as reason:
                self._tell(State.RESTARTING, str(reason))
                continue
            except (ChildError, DeploymentError, OSError) as failure:
                error = failure
            if self._together and not self._served():
                await self._together.settle()  # a stop that ended another rank's member first is no failure of this one
            if self._ending:
                break
            if not self._served():
                self._tell(State.FAILED, str(error))
                raise error
            deaths = 0 if asyncio.get_running_loop().time() - started > CALM_S else deaths
            delay = BACK_OFF_S[min(deaths, len(BACK_OFF_S) - 1)]
            deaths += 1
            log.error("%s; starting it again in %.1f s", error, delay)
            self._tell(State.RESTARTING, str(error))
            await self._pause(delay)
        self._tell(State.STOPPED)

    def expect_end(self) -> None:
        """From now on the child may end by itself: its engine is being stopped."""
        self._ending = True

    async def stop(self) -> None:
        """Stop the child, gracefully, and return once nothing is left of it; `run` returns then."""
        self._stopping.set()
        if self._child:
            self._tell(State.DRAINING)
            await self._child.stop(self.command.stop_grace_s)

    def kill(self) -> None:
        """End the child and all it started, at once."""
        self._stopping.set()
        if self._child:
            self._child.kill()

    async def _run_once(self) -> None:
        """One life of the child; returns when it was asked to stop.

        Raises:
            ChildError: It ended by itself.
            BrokenError: It was ended because its engine broke on another rank.
            DeploymentError: It was not ready in time.
            OSError: It could not be asked whether it is.
        """
        command = self.command
        self._ready.clear()
        self._broken = None
        env = {**command.env, **(self._together.environment if self._together else {})}
        child = self._spare.take(command.name, command.log_path, self._reported) if self._spare else None
        self._child = child = child or await start(
            command.name, command.argv, env, command.log_path, self._reported, command.folder, command.shielded
        )
        try:
            if self._stopping.is_set():  # the request came while there was no child to tell
                return
            self._tell(State.STARTING)
            async with asyncio.TaskGroup() as group:
                watches = [group.create_task(self._watch_readiness(child))]
                if self._together:
                    watches.append(group.create_task(self._watch_others(self._together, child)))
                code = await child.wait()
                self._engine_is_over()  # now, before anything is cleaned up: the others have to go too
                for watch in watches:
                    watch.cancel()
        except BaseExceptionGroup as errors:
            # An OSError: what tells whether it is ready could not be read from the shared file system just now.
            late = only(errors, DeploymentError) or only(errors, OSError)
            if late is None:
                raise
            raise late from None
        finally:
            # Also on the way out of a cancelled or failed deployment: nothing of the child may stay behind.
            await asyncio.shield(asyncio.ensure_future(child.stop(command.stop_grace_s)))
        if self._broken and not self._stopping.is_set():
            raise BrokenError(self._broken)
        if not self._stopping.is_set():
            raise child.error(code)

    async def _admitted(self) -> bool:
        """Wait for the child's turn to start; False when it was asked to stop meanwhile."""
        if self._together is None:
            return True
        turn = asyncio.ensure_future(self._together.may_start())
        stopped = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((turn, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            turn.cancel()
            stopped.cancel()
        return not self._stopping.is_set()

    def _served(self) -> bool:
        """Whether the child, or the engine that it is a member of, ever served."""
        return self.first_ready.is_set() if self._together is None else self._together.served

    async def _watch_others(self, together: Together, child: Child) -> None:
        reason = await together.broken()
        if not self._ending:
            self._broken = reason
            log.error("%s has to start again: %s", self.command.name, reason)
            await child.stop(BROKEN_GRACE_S)

    async def _watch_readiness(self, child: Child) -> None:
        try:
            async with asyncio.timeout(self.command.ready_timeout_s):
                if self.command.ready:
                    await self.command.ready()
                    self._reported(Report(State.READY))
                await self._ready.wait()
        except TimeoutError:
            message = (
                f"{self.command.name} was not ready within {self.command.ready_timeout_s:.0f} s "
                f"(engine.ready_timeout_s); the end of {child.log_path}:\n{child.tail()}"
            )
            child.kill()
            raise DeploymentError(message) from None

    def _reported(self, report: Report) -> None:
        state = State(report.state)
        if state is State.READY:
            self._ready.set()
            self.first_ready.set()
            if self._child:
                # All of an engine's is mapped now, and when it dies it may be too late to see whose it was.
                self._child.note_shared_memory()
            if self._together and self._together.leads:
                self._together.served = True
        if state is State.DRAINING:
            self._engine_is_over()  # it says so before it has ended
        if not self._stopping.is_set():
            self._tell(state, report.detail)

    def _engine_is_over(self) -> None:
        if self._together and not (self._stopping.is_set() or self._ending or self._broken):
            self._together.ask()

    def _tell(self, state: State, detail: str = "") -> None:
        self._on_state(self.command.name, state, self._child.pid if self._child else 0, detail)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass
