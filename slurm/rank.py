"""One rank of a deployment, as its agent knows it: what it works for, and how it waits for what others write."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from launch.plan import Plan
from launch.recipe import Recipe
from launch.records import Job, RunDirectory

POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """The rank `number` of the attempt that `job` is. `stop` is set once it has to end, by anybody."""

    run: RunDirectory
    recipe: Recipe
    plan: Plan
    job: Job
    number: int
    stop: asyncio.Event

    @property
    def attempt(self) -> int:
        """Number of the attempt."""
        return self.job.attempt

    async def wait_for(
        self, condition: Callable[[], bool], timeout_s: float, unless_stopped: bool = False, poll_s: float = POLL_S
    ) -> bool:
        """Poll until the condition holds; a stop also ends the wait (as if it held) when `unless_stopped`."""
        deadline = time.monotonic() + timeout_s
        while not holds(condition):
            if unless_stopped and self.stop.is_set():
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(poll_s)
        return True


def holds(condition: Callable[[], bool]) -> bool:
    """Whether it holds; not known, so not, while the shared file system has a bad moment."""
    with contextlib.suppress(OSError):
        return condition()
    return False
