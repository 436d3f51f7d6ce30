"""A process that waits takes the place of one that died, and is nobody's otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from launch.records import State
from slurm.spare import Spare
from slurm.supervise import Command, Supervised

# A frontend in small: with a name it serves, without one it waits for its name first.
SERVING = """
import os, sys, time
from slurm.children import report
from slurm.spare import wait_for_place
name = sys.argv[1] if len(sys.argv) > 1 else wait_for_place()
print(name, "serves", flush=True)
report("ready", name)
time.sleep(60)
"""


@pytest.fixture
async def spare(tmp_path: Path) -> AsyncIterator[Spare]:
    """One that is kept, and soon there."""
    argv = [sys.executable, "-c", SERVING]
    item = Spare(argv, os.environ, tmp_path / "spare.log", shielded=False, after_s=0.1)
    keeping = asyncio.create_task(item.keep())
    yield item
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping
    assert item.pid is None


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


def supervised(tmp_path: Path, spare: Spare, pids: list[int]) -> Supervised:
    """A child that tells its pids when it is ready."""
    command = Command(
        name="frontend-0",
        argv=[sys.executable, "-c", SERVING, "frontend-0"],
        env=os.environ,
        log_path=tmp_path / "frontend-0.log",
        ready_timeout_s=20,
        stop_grace_s=5,
    )

    def on_state(name: str, state: State, pid: int, detail: str) -> None:
        if state is State.READY:
            assert detail == "frontend-0"
            pids.append(pid)

    return Supervised(command, on_state, None, spare)


async def test_a_dead_child_is_followed_by_the_spare_and_that_by_the_next(tmp_path: Path, spare: Spare) -> None:
    """It has the dead one's name and log, says when it is ready, is stopped like any; and each time another one waits."""
    pids: list[int] = []
    waited: list[int | None] = []
    item = supervised(tmp_path, spare, pids)

    async def ready(times: int) -> None:
        await until(lambda: len(pids) == times)

    running = asyncio.create_task(item.run())
    await ready(1)
    for deaths in (1, 2):
        await until(lambda: spare.pid not in (None, *pids))
        waited.append(spare.pid)
        os.kill(pids[-1], 9)
        await ready(deaths + 1)
    await until(lambda: spare.pid not in (None, *pids))
    await item.stop()
    await running

    assert pids[1:] == waited
    assert (tmp_path / "frontend-0.log").read_text().count("frontend-0 serves") == 3
    assert "serves" not in (tmp_path / "spare.log").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


async def test_a_spare_that_died_is_given_to_nobody(tmp_path: Path, spare: Spare) -> None:
    """The child is started anew then, as if there had never been one."""
    pids: list[int] = []
    item = supervised(tmp_path, spare, pids)
    running = asyncio.create_task(item.run())
    await until(lambda: len(pids) == 1 and spare.pid is not None)
    dead = spare.pid
    assert dead
    os.kill(dead, 9)
    await until(lambda: spare.pid != dead)
    os.kill(pids[0], 9)
    await until(lambda: len(pids) == 2)
    await item.stop()
    await running

    assert pids[1] != dead


async def test_a_spare_ends_when_its_agent_does() -> None:
    """All that it waits for is a line; where none can come any more it leaves, with success."""
    read_end, write_end = os.pipe()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVING, stdin=read_end)
    os.close(read_end)
    os.close(write_end)

    assert await asyncio.wait_for(process.wait(), 20) == 0
