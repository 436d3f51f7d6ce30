"""Whether a worker takes requests: standing, canaries, and signs of life of the engine's processes.

A worker whose engine neither takes a step nor answers a request of its own leaves the routing, and comes back once that
request is answered. An idle engine is asked now and then; one that has requests and takes no step is asked at once, so that
they go on elsewhere within the stall timeout. The worker alone judges its engine, and frontends believe its beats.

Slow is not sick: every step of the scheduler starts the clock anew, so neither a long prefill (reported chunk by chunk) nor
a long queue is an alarm; a single step during which the engine's processes compute or wait for a core, as when kernels are
compiled, gets `PATIENCE` times the canary's timeout; and time that this process itself was held up, as when a laptop is
closed, does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workers.engine.base import Ask, Engine, LostError, RefusedError
from workers.engine.metrics import Canaries, EngineStats
from workers.engine.server import RequestServer
from workers.runtime import wire
from workers.runtime.awake import AwakeClock

log = logging.getLogger(__name__)

TICK_S = 0.25
STUCK_S = 5.0
PATIENCE = 4
BUSY_SHARE = 0.5
CANARY = "canary"
# Shorter than any block, so that it neither fills nor hits the prefix cache and makes no KV event; id 0 is in any vocabulary.
PROMPT = [0]
POOLING, POOLING_BODY = "pooling", b'{"input":[[0]]}'


class Standing:
    """Why a worker takes no requests; it takes them while there is no reason not to."""

    def __init__(self, on_change: Callable[[bool], None]) -> None:
        """Make the standing; `on_change` is told whether the worker serves, whenever that changes."""
        self._reasons: dict[str, str] = {}
        self._on_change = on_change

    @property
    def serving(self) -> bool:
        """Whether the worker takes requests."""
        return not self._reasons

    @property
    def reason(self) -> str | None:
        """What to tell who asks why it does not; may be read by any thread."""
        return "; ".join(list(self._reasons.values())) or None

    def out(self, key: str, reason: str) -> None:
        """Take no requests, for one reason among others."""
        before = self.serving
        self._reasons[key] = reason
        if before:
            self._on_change(False)

    def back(self, key: str) -> None:
        """A reason has gone; the last one to go brings the requests back."""
        if self._reasons.pop(key, None) is not None and self.serving:
            self._on_change(True)

    def only(self, key: str) -> bool:
        """Whether there is no reason but this one."""
        return not self._reasons.keys() - {key}


class OperatorGate:
    """What operations use of a worker: its standing, and the requests that are in (`workers.engine.operations.Gate`).

    Withdrawn by an operator is a reason of its own, so that a canary's recovery does not undo it.
    """

    KEY = "operator"

    def __init__(self, standing: Standing, server: RequestServer) -> None:
        self._standing = standing
        self._server = server

    @property
    def streams(self) -> int:
        """Requests that are being served."""
        return self._server.streams

    def withdraw(self) -> None:
        """Let no more in."""
        self._standing.out(self.KEY, "withdrawn by an operator")

    def admit(self) -> None:
        """Let them in again, if nothing else forbids it."""
        self._standing.back(self.KEY)

    async def finish(self, timeout_s: float) -> int:
        """Wait for those that are in; returns how many had to be given back."""
        return await self._server.finish(timeout_s)


@dataclass(slots=True)
class Pulse:
    """Whether the loop turns."""

    last: float = field(default_factory=time.monotonic)

    async def beat(self) -> None:
        """Show that it does; for ever."""
        while True:
            self.last = time.monotonic()
            await asyncio.sleep(TICK_S)

    @property
    def alive(self) -> bool:
        """Whether it did lately; may be asked by any thread."""
        return time.monotonic() - self.last < STUCK_S


class Canary:
    """Requests that a worker sends to one rank of its own engine when that has done nothing for a while."""

    def __init__(
        self,
        probe: Callable[[], Awaitable[None]],
        stats: EngineStats,
        counts: Canaries,
        interval_s: float,
        timeout_s: float,
        stall_s: float = math.inf,
        requests: Callable[[], int] = lambda: 0,
    ) -> None:
        """Make a canary.

        Args:
            probe: Returns once the rank has answered; raises LostError if it cannot, RefusedError if it will not.
            stats: The rank's; `last_step` shows that it lives.
            counts: Where the results are counted.
            interval_s: Sent after this long without a step.
            timeout_s: Failed after this long without an answer or a step.
            stall_s: While requests run: half of it is the interval, and the other half the timeout.
            requests: How many run, canaries left out.
        """
        self._probe = probe
        self._stats = stats
        self._counts = counts
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._stall_s = stall_s
        self._requests = requests
        self._clock = AwakeClock()
        self._resumed = 0.0

    def _quiet_s(self, since: float) -> float:
        """Seconds without a step, since a moment or the end of the last pause of this process."""
        if self._clock.tick():
            self._resumed = time.monotonic()
        return time.monotonic() - max(since, self._stats.last_step, self._resumed)

    def _within(self, limit_s: float) -> float:
        """A limit, or what the stall timeout leaves of it while requests run."""
        return min(limit_s, self._stall_s / 2) if self._requests() else limit_s

    async def watch(
        self,
        suspended: Callable[[], bool],
        on_failed: Callable[[str], None],
        on_answered: Callable[[], None],
        computing: Callable[[], float],
    ) -> None:
        """Send canaries; for ever.

        Args:
            suspended: Whether none should be sent now: the engine sleeps, or the worker leaves.
            on_failed: Told once, with the reason, when a canary is overdue or lost.
            on_answered: Told after each answer.
            computing: CPU seconds that the engine's processes have used; see `cpu_seconds`.
        """
        idle_since = time.monotonic()
        while True:
            await asyncio.sleep(min(TICK_S, self._interval_s / 4))
            if suspended():
                idle_since = time.monotonic()
            elif self._quiet_s(idle_since) >= self._within(self._interval_s):
                await self._send(suspended, on_failed, on_answered, computing)
                idle_since = time.monotonic()

    async def _send(
        self,
        suspended: Callable[[], bool],
        on_failed: Callable[[str], None],
        on_answered: Callable[[], None],
        computing: Callable[[], float],
    ) -> None:
        """One canary, from its sending until it is answered, lost or withdrawn; a failed one is still waited for."""
        sent = time.monotonic()
        used_cpu = computing()
        failed = False

        def fail(reason: str) -> None:
            nonlocal failed
            failed = True
            self._counts.failed += 1
            on_failed(reason)

        task = asyncio.ensure_future(self._probe())
        try:
            while not task.done() and not suspended():
                await asyncio.wait({task}, timeout=min(TICK_S, self._timeout_s / 4))
                if failed or task.done():
                    continue
                quiet_s = self._quiet_s(sent)
                if quiet_s <= self._within(self._timeout_s):
                    continue
                busy = computing() - used_cpu > BUSY_SHARE * (time.monotonic() - sent) and not stopped()
                if not busy or quiet_s > PATIENCE * self._timeout_s:
                    fail(f"the engine took no step and answered no canary for {quiet_s:.0f} s")
            if not task.done():
                return
            await task
        except RefusedError as error:
            # It cannot be asked this way; that it takes steps while it has work is all that can be known.
            log.debug("the engine refuses canaries: %s", error)
            return
        except LostError as error:
            if not failed:
                fail(f"the engine failed a canary: {error}")
            return
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._counts.answered += 1
        self._counts.last_s = time.monotonic() - sent
        on_answered()


@dataclass(frozen=True, slots=True)
class Watch:
    """The canaries of all ranks of an engine, and what follows from them."""

    engine: Engine
    standing: Standing
    counts: Canaries
    on_failed: Callable[[str], None]
    """Told when the worker leaves the routing: what it serves has no future here."""

    async def run(
        self, interval_s: float, timeout_s: float, stall_s: float = math.inf, requests: Callable[[], int] = lambda: 0
    ) -> None:
        """Watch for ever; an interval of 0 watches nothing. The arguments are those of `Canary`."""
        if not interval_s:
            return
        numbers = itertools.count()
        sick: dict[int, str] = {}

        def probe(rank: int) -> Callable[[], Awaitable[None]]:
            return lambda: ask_one_token(self.engine, f"canary-{next(numbers)}", rank)

        def failed(rank: int, reason: str) -> None:
            reason = f"rank {rank}: {reason}" if len(self.engine.stats) > 1 else reason
            log.error("%s; taking no requests until it does", reason)
            sick[rank] = reason
            self.standing.out(CANARY, reason)
            self.on_failed(reason)

        def answered(rank: int) -> None:
            if sick.pop(rank, None) is not None:
                log.info("the engine answers again")
            if not sick:
                self.standing.back(CANARY)

        async with asyncio.TaskGroup() as group:
            for rank, stats in self.engine.stats.items():
                canary = Canary(probe(rank), stats, self.counts, interval_s, timeout_s, stall_s, requests)
                group.create_task(
                    canary.watch(
                        suspended=lambda: not self.standing.only(CANARY),
                        on_failed=lambda reason, rank=rank: failed(rank, reason),  # type: ignore[misc]  # bound now
                        on_answered=lambda rank=rank: answered(rank),  # type: ignore[misc]  # bound now
                        computing=cpu_seconds,
                    ),
                    name=f"canary-{rank}",
                )


async def ask_one_token(engine: Engine, request_id: str, rank: int) -> None:
    """Have a rank of the engine produce one token; of a pooling model's engine, have any rank compute one.

    Without transfer parameters also where prompts are computed for other engines: vLLM then frees the blocks at once,
    while those of a prefill leg stay until they are pulled.

    Raises:
        LostError: It could not.
        RefusedError: It will not, as a pooling model that answers nothing as simple as that.
    """
    ask = Ask(
        request_id=request_id,
        prompt=PROMPT,
        render=wire.NOTHING,
        options=b'{"temperature":0,"ignore_eos":true}',
        max_tokens=1,
        dp_rank=rank,
    )
    if "generate" not in engine.sizes.tasks:
        answered = await engine.call(request_id, POOLING, POOLING_BODY)
        if answered.status >= 500:
            raise LostError(f"a canary was answered with {answered.status}")
        return
    async for _ in engine.generate(ask):
        pass


def fallen_cores(llm: Any) -> list[str]:
    """Names of engine core processes of an AsyncLLM that have ended; none where vLLM's internals are not as expected.

    `AsyncLLM.errored` says so too, but with data parallelism only once vLLM has ended the other cores (5.8 s, vLLM 0.32).
    """
    resources = getattr(getattr(llm, "engine_core", None), "resources", None)
    finished = getattr(getattr(resources, "engine_manager", None), "finished_procs", None)
    if not callable(finished):
        return []
    found: Mapping[str, int] = finished()
    return [f"{name} ended with code {code}" for name, code in found.items()]


def cpu_seconds() -> float:
    """Time that the main threads of all processes below this one have run, or have waited for a core to run on.

    Main threads only: that is where an engine computes and compiles, while NIXL polls in a thread of its own, idle or not.
    Waiting counts: on a machine with more work than cores an engine that computes gets little of them.
    """
    return sum(_main_thread_ns(pid) for pid in _descendants(os.getpid())) / 1e9


def stopped() -> bool:
    """Whether a process below this one is stopped by a signal: then what the others do, which wait for it, is no work."""
    return any(_stat(Path(f"/proc/{pid}/stat"))[:1] == ["T"] for pid in _descendants(os.getpid()))


def _main_thread_ns(pid: int) -> int:
    """On a core and in its queue, by the scheduler's own count (proc(5): schedstat)."""
    try:
        ran, waited, _ = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0
    return int(ran) + int(waited)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            fields = _stat(Path(f"/proc/{entry.name}/stat"))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _stat(path: Path) -> list[str]:
    """The fields of a stat file of proc(5) from the third, the state, on; empty if the process has ended."""
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return []
