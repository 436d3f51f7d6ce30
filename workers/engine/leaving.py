"""The ways out of a worker: asked to stop, asked twice, or left by its engine.

Asked to stop, a worker takes nothing new, finishes or gives back what runs, waits until what it computed for others has
been pulled, and ends its engine. Asked twice, it is gone at once: its frontends see the connection break, and the engine's
processes end with it (`workers.engine.orphans`).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

from slurm.signals import AGAIN_AFTER_S
from workers.engine.base import Engine
from workers.engine.metrics import EngineStats

log = logging.getLogger(__name__)

POLL_S = 0.1
# An engine that holds blocks for somebody takes a step each millisecond (vLLM 0.32); one that takes none holds nothing.
STILL_S = 2.0
# What is left for pulls when requests took all the time that a drain may take.
LAST_PULLS_S = 5.0
TOLD_TWICE = 128 + signal.SIGTERM


class Stop:
    """SIGTERM or SIGINT, once or twice; install it in the loop. What comes within `again_after_s` is the same wish."""

    def __init__(self, again_after_s: float = AGAIN_AFTER_S) -> None:
        self.asked = asyncio.Event()
        self._asked_at = 0.0
        self._again_after_s = again_after_s
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, self._ask)

    def _ask(self) -> None:
        now = time.monotonic()
        if self.asked.is_set() and now - self._asked_at < self._again_after_s:
            return
        if self.asked.is_set():
            log.warning("asked again: ending at once")
            leave_at_once(TOLD_TWICE)
        self._asked_at = now
        self.asked.set()


async def until_stopped(engine: Engine, stop: Stop) -> str | None:
    """Wait for the request to stop, which returns None, or for the engine's death, which returns why.

    An engine core that ends after the request is none: Slurm signals all processes of a step, not only this one.
    """
    while not stop.asked.is_set():
        death = engine.dead()
        try:
            async with asyncio.timeout(POLL_S):
                await stop.asked.wait()
        except TimeoutError:
            if death:
                return death
    return None


async def until_pulled(ranks: Mapping[int, EngineStats], timeout_s: float) -> bool:
    """Wait until no rank holds KV blocks; call it when no request runs, so that those left wait for their decode.

    Returns whether they were all pulled in time.
    """
    deadline = time.monotonic() + timeout_s
    while held := [rank for rank in ranks.values() if rank.kv_usage > 0 and _turns(rank)]:
        if time.monotonic() > deadline:
            log.warning(
                "ended the wait of %.0f s for %d engine ranks whose KV cache nobody pulled", timeout_s, len(held)
            )
            return False
        await asyncio.sleep(POLL_S)
    return True


def _turns(rank: EngineStats) -> bool:
    return time.monotonic() - rank.last_step < STILL_S


def time_for_pulls(lease_s: float, drain_s: float, used_s: float) -> float:
    """Seconds that a leaving worker waits for pulls: the lease at most, and what its requests left of the drain."""
    return min(lease_s, max(drain_s - used_s, LAST_PULLS_S))


def leave(code: int) -> NoReturn:
    """End this process once what was registered for its end has run, spans of traces to be sent among it.

    After that the interpreter would take apart all that vLLM and torch have loaded: 2 s of CPU time, when a stop is waited
    for, to free what the process's end frees anyway.
    """
    atexit._run_exitfuncs()
    leave_at_once(code)


def leave_at_once(code: int) -> NoReturn:
    """End this process without another step of anything.

    The interpreter's own way out would wait for the engine's processes, which may be stopped or stuck. They end with this
    one; what they leave behind is the agent's to clean (`slurm.children`).
    """
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # a full disk keeps nobody here
        os._exit(code)
