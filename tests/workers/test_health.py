"""When a worker takes no requests: slow is not sick, and what was sick comes back."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from workers.engine.base import LostError, RefusedError
from workers.engine.health import PATIENCE, Canary, Pulse, Standing, cpu_seconds, fallen_cores, stopped
from workers.engine.metrics import Canaries, EngineStats

INTERVAL_S = 0.05
TIMEOUT_S = 0.2


@dataclass
class Trial:
    """A canary on a rank that answers as `probe` does, and what it said."""

    probe: Callable[[], Awaitable[None]]
    stats: EngineStats = field(default_factory=EngineStats)
    counts: Canaries = field(default_factory=Canaries)
    cpu_s: Callable[[], float] = lambda: 0.0
    suspended: bool = False
    said: list[str] = field(default_factory=list)
    interval_s: float = INTERVAL_S
    timeout_s: float = TIMEOUT_S
    stall_s: float = math.inf
    requests: int = 0

    async def run(self, seconds: float) -> None:
        """Watch for so long."""
        canary = Canary(
            self.probe,
            self.stats,
            self.counts,
            self.interval_s,
            self.timeout_s,
            self.stall_s,
            lambda: self.requests,
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await canary.watch(
                    lambda: self.suspended, self.said.append, lambda: self.said.append("answered"), self.cpu_s
                )


async def answer() -> None:
    """An engine that does."""


async def never() -> None:
    """An engine that does not."""
    await asyncio.Event().wait()


async def test_an_idle_engine_is_asked_once_an_interval() -> None:
    """Not more often."""
    trial = Trial(answer)
    await trial.run(10.5 * INTERVAL_S)

    assert 2 <= trial.counts.answered <= 10
    assert set(trial.said) == {"answered"}


async def test_an_engine_that_takes_steps_is_not_asked() -> None:
    """It shows that it lives."""
    trial = Trial(answer)

    async def work() -> None:
        while True:
            trial.stats.record(None, None)
            await asyncio.sleep(INTERVAL_S / 10)

    worker = asyncio.create_task(work())
    await trial.run(6 * INTERVAL_S)
    worker.cancel()

    assert trial.counts == Canaries()


async def test_an_overdue_canary_is_told_once_and_its_late_answer_too() -> None:
    """As when the engine's process is stopped, and goes on."""
    resumed = asyncio.Event()

    async def stopped() -> None:
        await resumed.wait()

    trial = Trial(stopped)
    run = asyncio.create_task(trial.run(10))
    while not trial.said:
        await asyncio.sleep(0.01)
    await asyncio.sleep(3 * TIMEOUT_S)
    assert len(trial.said) == 1
    assert "took no step" in trial.said[0]
    resumed.set()
    while len(trial.said) < 2:
        await asyncio.sleep(0.01)
    run.cancel()

    assert trial.said[1] == "answered"
    assert trial.counts.failed == 1


async def test_steps_put_the_deadline_off() -> None:
    """A long prefill, chunk by chunk, before which the canary cannot be answered: no alarm."""
    trial = Trial(never)
    begun = time.monotonic()

    async def chunks() -> None:
        while True:
            if trial.said or time.monotonic() - begun > INTERVAL_S * 3:  # the canary is out
                trial.stats.record(None, None)
            await asyncio.sleep(TIMEOUT_S / 4)

    worker = asyncio.create_task(chunks())
    await trial.run(5 * TIMEOUT_S)
    worker.cancel()

    assert trial.said == []


@pytest.mark.parametrize(
    ("share", "alarms"),
    [
        pytest.param(0.0, 1, id="stopped"),
        pytest.param(0.2, 1, id="polling"),
        pytest.param(1.0, 0, id="compiling"),
    ],
)
async def test_a_step_that_computes_may_take_longer(share: float, alarms: int) -> None:
    """By the CPU time of the engine's processes."""
    trial = Trial(never, cpu_s=lambda: share * time.monotonic())
    await trial.run(INTERVAL_S + 2 * TIMEOUT_S)

    assert len(trial.said) == alarms


async def test_a_step_that_computes_for_ever_is_an_alarm_too() -> None:
    """A collective that spins for a dead peer looks like that."""
    trial = Trial(never, cpu_s=time.monotonic)
    await trial.run(INTERVAL_S + (PATIENCE + 1) * TIMEOUT_S)

    assert len(trial.said) == 1


@pytest.mark.parametrize(("requests", "alarms"), [pytest.param(1, 1, id="requests run"), pytest.param(0, 0, id="idle")])
async def test_an_engine_that_stalls_under_requests_is_found_within_the_stall_timeout(
    requests: int, alarms: int
) -> None:
    """However patient the canaries of an idle engine are."""
    trial = Trial(never, interval_s=60, timeout_s=60, stall_s=1.0, requests=requests)
    await trial.run(1.6)

    assert len(trial.said) == alarms


@pytest.mark.parametrize(("share", "alarms"), [pytest.param(1.0, 0, id="compiling"), pytest.param(0.0, 1, id="hung")])
async def test_a_long_step_under_requests_has_the_canarys_patience(share: float, alarms: int) -> None:
    """While the engine's processes compute, the stall timeout ends nothing."""
    trial = Trial(never, interval_s=60, timeout_s=60, stall_s=0.4, requests=3, cpu_s=lambda: share * time.monotonic())
    await trial.run(2)

    assert len(trial.said) == alarms


async def test_a_pause_of_the_worker_is_no_stall_of_its_engine() -> None:
    """As when a laptop is closed: both stood still, and the engine has its time anew."""
    trial = Trial(never, interval_s=60, timeout_s=60, stall_s=1.6, requests=1)
    run = asyncio.create_task(trial.run(10))
    await asyncio.sleep(0.5)
    time.sleep(2)  # noqa: ASYNC251  # to hold up the loop is the point
    await asyncio.sleep(0.7)
    soon_after = list(trial.said)
    await asyncio.sleep(2)
    run.cancel()

    assert soon_after == []
    assert len(trial.said) == 1


def test_a_stopped_child_is_no_work() -> None:
    """Whatever its siblings do meanwhile: they may be spinning for it."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            running = stopped()
            os.kill(child.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED)
            assert stopped()
        finally:
            child.kill()

    assert not running


async def test_a_lost_canary_is_a_failed_one() -> None:
    """Each anew: the engine answers, that it cannot."""

    async def lost() -> None:
        raise LostError("the engine ended the request with 'error'")

    trial = Trial(lost)
    await trial.run(5.5 * INTERVAL_S)

    assert trial.counts.answered == 0
    assert trial.counts.failed >= 2
    assert "ended the request" in trial.said[0]


async def test_an_engine_that_refuses_canaries_is_left_alone() -> None:
    """It says nothing of its health."""

    async def refuse() -> None:
        raise RefusedError("this model does not generate")

    trial = Trial(refuse)
    await trial.run(5 * INTERVAL_S)

    assert trial.said == []
    assert trial.counts == Canaries()


async def test_a_worker_that_leaves_withdraws_its_canary() -> None:
    """It would wait for nothing, and must not be an alarm."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def withdrawn() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    trial = Trial(withdrawn)
    run = asyncio.create_task(trial.run(10))
    await began.wait()
    trial.suspended = True
    async with asyncio.timeout(2):
        await ended.wait()
    await asyncio.sleep(2 * TIMEOUT_S)
    run.cancel()

    assert trial.said == []


def test_a_worker_serves_while_there_is_no_reason_not_to() -> None:
    """Two reasons have to go; each change is told once."""
    told: list[bool] = []
    standing = Standing(told.append)
    standing.out("canary", "the engine is stuck")
    standing.out("asleep", "asleep")
    both = standing.reason
    standing.back("canary")
    assert not standing.serving
    assert not standing.only("canary")
    standing.back("asleep")
    standing.back("asleep")

    assert both == "the engine is stuck; asleep"
    assert standing.serving
    assert standing.reason is None
    assert told == [False, True]


async def test_a_blocked_loop_has_no_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    """And has one again when it turns."""
    monkeypatch.setattr("workers.engine.health.STUCK_S", 0.4)
    pulse = Pulse()
    task = asyncio.create_task(pulse.beat())
    await asyncio.sleep(0.05)
    time.sleep(0.6)  # noqa: ASYNC251  # to block the loop is the point
    blocked = pulse.alive
    await asyncio.sleep(0.3)
    task.cancel()

    assert not blocked
    assert pulse.alive


def test_only_main_threads_of_children_count_as_computing() -> None:
    """A child that computes is seen, a thread that polls beside an idle main thread is not: NIXL has one."""

    def used_while(code: str) -> float:
        with subprocess.Popen([sys.executable, "-c", code]) as child:
            try:
                time.sleep(0.5)
                before = cpu_seconds()
                time.sleep(0.6)
                return cpu_seconds() - before
            finally:
                child.kill()

    computing = used_while("while True: pass")
    polling = used_while(
        "import threading, time\ndef spin():\n while True: pass\n"
        "threading.Thread(target=spin, daemon=True).start()\ntime.sleep(60)"
    )

    assert computing > 0.1
    assert polling < computing / 2


def test_vllm_without_the_expected_inside_is_no_death() -> None:
    """The path of attributes is vLLM's own business."""
    manager = SimpleNamespace(finished_procs=lambda: {"EngineCore_DP1": -9})
    with_manager = SimpleNamespace(engine_core=SimpleNamespace(resources=SimpleNamespace(engine_manager=manager)))

    assert fallen_cores(SimpleNamespace()) == []
    assert fallen_cores(SimpleNamespace(engine_core=SimpleNamespace(resources=None))) == []
    assert fallen_cores(with_manager) == ["EngineCore_DP1 ended with code -9"]
