"""Keep one child running: start it, wait until it is ready, start it again when it dies, stop it when asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import ChildError, DeploymentError
from launch.records import State
from slurm.children import Child, Report, start

log = logging.getLogger(__name__)

BACK_OFF_S = (0.1, 1.0, 2.0, 5.0, 10.0, 30.0)
CALM_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to run, and how to know that it serves: by `ready`, or else by the child's own report."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log_path: Path
    ready_timeout_s: float
    stop_grace_s: float
    ready: Callable[[], Awaitable[None]] | None = None


class Supervised:
    """One supervised child. A death before it was ever ready is an error; any later one is repaired."""

    def __init__(self, command: Command, on_state: Callable[[str, State, int, str], None]) -> None:
        self.command = command
        self.first_ready = asyncio.Event()
        self._on_state = on_state
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
        while not self._stopping.is_set():
            started = asyncio.get_running_loop().time()
            try:
                await self._run_once()
                break  # it was asked to stop
            except (ChildError, DeploymentError, OSError) as failure:
                error = failure
            if not self.first_ready.is_set():
                self._tell(State.FAILED, str(error))
                raise error
            deaths = 0 if asyncio.get_running_loop().time() - started > CALM_S else deaths
            delay = BACK_OFF_S[min(deaths, len(BACK_OFF_S) - 1)]
            deaths += 1
            log.error("%s; starting it again in %.1f s", error, delay)
            self._tell(State.RESTARTING, str(error))
            await self._pause(delay)
        self._tell(State.STOPPED)

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
            DeploymentError: It was not ready in time.
        """
        command = self.command
        self._ready.clear()
        self._child = child = await start(command.name, command.argv, command.env, command.log_path, self._reported)
        try:
            if self._stopping.is_set():  # the request came while there was no child to tell
                return
            self._tell(State.STARTING)
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch_readiness(child))
                code = await child.wait()
                watch.cancel()
        except* DeploymentError as errors:
            raise errors.exceptions[0] from None
        finally:
            # Also on the way out of a cancelled or failed deployment: nothing of the child may stay behind.
            await asyncio.shield(asyncio.ensure_future(child.stop(command.stop_grace_s)))
        if not self._stopping.is_set():
            raise child.error(code)

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
        if not self._stopping.is_set():
            self._tell(state, report.detail)

    def _tell(self, state: State, detail: str = "") -> None:
        self._on_state(self.command.name, state, self._child.pid if self._child else 0, detail)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass
