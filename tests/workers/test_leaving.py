"""How a worker leaves: with its pulls done, or at once."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time

import pytest

from workers.engine.leaving import LAST_PULLS_S, TOLD_TWICE, time_for_pulls, until_pulled
from workers.engine.metrics import EngineStats


@pytest.mark.parametrize(
    ("lease_s", "drain_s", "used_s", "expected"),
    [
        pytest.param(30, 60, 1, 30, id="the lease"),
        pytest.param(30, 20, 5, 15, id="what the drain has left"),
        pytest.param(30, 20, 20, LAST_PULLS_S, id="a last chance"),
        pytest.param(2, 20, 20, 2, id="never beyond the lease"),
    ],
)
def test_pulls_are_waited_for_within_bounds(lease_s: float, drain_s: float, used_s: float, expected: float) -> None:
    """So that the agent's own patience is enough."""
    assert time_for_pulls(lease_s, drain_s, used_s) == expected


async def test_a_worker_waits_until_its_blocks_are_pulled() -> None:
    """Of all ranks."""
    held, free = EngineStats(kv_usage=0.3), EngineStats()
    turns = 0

    async def pull() -> None:
        nonlocal turns
        while turns < 10:
            turns += 1
            held.record(None, None)
            await asyncio.sleep(0.05)
        held.kv_usage = 0.0

    task = asyncio.create_task(pull())
    done = await until_pulled({0: free, 1: held}, timeout_s=10)
    await task

    assert done
    assert turns == 10


async def test_the_wait_for_pulls_ends() -> None:
    """With the time that there is."""
    stats = EngineStats(kv_usage=0.3)

    async def turn() -> None:
        while True:
            stats.record(None, None)
            await asyncio.sleep(0.05)

    task = asyncio.create_task(turn())
    done = await until_pulled({0: stats}, timeout_s=0.3)
    task.cancel()

    assert not done


async def test_an_engine_that_stands_still_holds_nothing() -> None:
    """Its last word may be older than the release of its blocks; one that holds some turns without pause."""
    stats = EngineStats(kv_usage=0.3)
    stats.last_step = time.monotonic() - 60

    assert await until_pulled({0: stats}, timeout_s=10)


WAITING = """
import asyncio
from workers.engine.leaving import Stop

async def main():
    stop = Stop(again_after_s=0.2)
    print("ready", flush=True)
    await stop.asked.wait()
    print("asked", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_second_sigterm_ends_the_process_at_once() -> None:
    """With a code that is no success, and no wait for anything; unless it comes within a moment of the first."""
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)  # Slurm and srun both tell it: no second wish
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.4)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(10)

    assert code == TOLD_TWICE
    assert time.monotonic() - asked < 2


def test_a_worker_that_leaves_runs_what_was_registered_for_its_end() -> None:
    """And nothing of the interpreter's own end, which is long once vLLM is loaded: `__del__` stands for it here."""
    code = (
        "import atexit, sys\n"
        "from workers.engine.leaving import leave\n"
        "class Loaded:\n"
        "    def __del__(self): print('taken apart')\n"
        "loaded = Loaded()\n"
        "atexit.register(print, 'flushed')\n"
        "leave(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (3, "flushed\n")
