"""A child never outlives its agent's wish, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.errors import ChildError, DeploymentError
from launch.records import State
from slurm import children
from slurm.supervise import Command, Supervised

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
REPORTING = """
import time
from slurm.children import report
report("loading"); report("ready", "here")
time.sleep(60)
"""


async def start(tmp_path: Path, code: str, seen: list[children.Report] | None = None) -> children.Child:
    """A Python child."""
    on_report = seen.append if seen is not None else None
    return await children.start("child", [sys.executable, "-c", code], os.environ, tmp_path / "log", on_report)


async def test_a_child_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    """After the grace, and the whole group."""
    child = await start(tmp_path, STUBBORN)
    while not (tmp_path / "log").read_text():
        await asyncio.sleep(0.02)
    grandchild = int((tmp_path / "log").read_text())
    code = await child.stop(grace_s=0.3)

    assert code == -signal.SIGKILL
    assert not children.group_alive(child.pid)
    assert not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text()


async def test_scratch_and_shared_memory_of_a_killed_child_are_removed(tmp_path: Path) -> None:
    """Segments carry no owner's name; they are found by who has them mapped."""
    code = (
        "import mmap, os, pathlib, time\n"
        f"path = '/dev/shm/baton_test_{os.getpid()}'\n"
        "pathlib.Path(path).write_bytes(bytes(4096))\n"
        "file = open(path, 'r+b'); memory = mmap.mmap(file.fileno(), 4096)\n"
        "pathlib.Path(os.environ['TMPDIR'], 'socket').touch()\n"
        "print(os.environ['TMPDIR'], flush=True)\n"
        "time.sleep(60)\n"
    )
    child = await start(tmp_path, code)
    while not (tmp_path / "log").read_text():
        await asyncio.sleep(0.02)
    scratch = Path((tmp_path / "log").read_text().strip())
    assert scratch.is_dir()
    await child.stop(grace_s=0.0)

    assert not scratch.exists()
    assert not Path(f"/dev/shm/baton_test_{os.getpid()}").exists()


async def test_reports_arrive_in_order(tmp_path: Path) -> None:
    """A child tells its state on a descriptor of its own."""
    seen: list[children.Report] = []
    child = await start(tmp_path, REPORTING, seen)
    while len(seen) < 2:
        await asyncio.sleep(0.02)
    await child.stop(1)

    assert seen == [children.Report("loading"), children.Report("ready", "here")]


@pytest.mark.parametrize("shielded", [False, True], ids=["", "shielded"])
def test_a_child_ends_when_its_agent_is_killed(tmp_path: Path, shielded: bool) -> None:
    """Even by SIGKILL: the kernel tells it, and that is no word of Slurm's."""
    child_code = "import time; from slurm import shield; shield.hear(); print(1, flush=True); time.sleep(60)"
    log = tmp_path / "log"
    code = (
        "import asyncio, os, sys, pathlib\n"
        "from slurm import children\n"
        "async def main():\n"
        f"    log = pathlib.Path({str(log)!r})\n"
        f"    argv = [sys.executable, '-c', {child_code!r}]\n"
        f"    child = await children.start('c', argv, os.environ, log, shielded={shielded})\n"
        "    while not log.read_text():\n"
        "        await asyncio.sleep(0.02)\n"
        "    print(child.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout
        child = int(agent.stdout.readline())
        agent.kill()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)

    assert not Path(f"/proc/{child}").exists()


def command(tmp_path: Path, code: str, ready_timeout_s: float = 10) -> Command:
    """A command to supervise."""
    return Command(
        name="child",
        argv=[sys.executable, "-c", code],
        env=os.environ,
        log_path=tmp_path / "log",
        ready_timeout_s=ready_timeout_s,
        stop_grace_s=1,
    )


async def test_a_death_while_loading_brings_the_last_lines_of_the_log() -> None:
    """The reason is in the error, not in a file that nobody opens."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    log = folder / f"baton-test-{os.getpid()}.log"
    item = Supervised(
        Command(
            name="engine",
            argv=[sys.executable, "-c", "raise SystemExit('no such weights')"],
            env=os.environ,
            log_path=log,
            ready_timeout_s=10,
            stop_grace_s=1,
        ),
        lambda *said: None,
    )
    try:
        with pytest.raises(ChildError, match="engine exited with code 1(.|\n)*no such weights"):
            await item.run()
    finally:
        log.unlink()


async def test_a_child_that_never_gets_ready_is_ended_and_named(tmp_path: Path) -> None:
    """With the key that sets the limit."""
    states: list[State] = []
    item = Supervised(
        command(tmp_path, "import time; print('still here', flush=True); time.sleep(60)", 1.0),
        lambda name, state, pid, detail: states.append(state),
    )
    with pytest.raises(DeploymentError, match=r"not ready within 1 s \(engine.ready_timeout_s\)(.|\n)*still here"):
        await item.run()

    assert states[-1] is State.FAILED


async def test_a_stop_before_the_child_is_there_is_kept(tmp_path: Path) -> None:
    """Asked while it is being started, or before: it ends, and nothing waits for it for ever."""
    for wait_s in (0.0, 0.001, 0.01):
        item = Supervised(command(tmp_path, REPORTING), lambda *said: None)
        task = asyncio.create_task(item.run())
        await asyncio.sleep(wait_s)
        await item.stop()
        async with asyncio.timeout(10):
            await task


async def test_a_restart_that_fails_is_tried_again(tmp_path: Path) -> None:
    """Once it was ready, no single member's bad luck ends the deployment."""
    once = tmp_path / "once"
    code = (
        "import pathlib, time\nfrom slurm.children import report\n"
        f"first = pathlib.Path({str(once)!r})\n"
        "lives = len(first.read_text()) if first.exists() else 0\n"
        "first.write_text('x' * (lives + 1))\n"
        "if lives == 1: raise SystemExit('not this time')\n"
        "report('ready')\nif lives == 0: raise SystemExit('died')\ntime.sleep(60)\n"
    )
    states: list[State] = []
    item = Supervised(command(tmp_path, code), lambda name, state, pid, detail: states.append(state))
    task = asyncio.create_task(item.run())
    async with asyncio.timeout(20):
        while states.count(State.READY) < 2:
            await asyncio.sleep(0.05)
    await item.stop()
    await task

    assert states.count(State.RESTARTING) == 2


async def test_a_file_that_cannot_be_read_at_a_restart_is_no_end(tmp_path: Path) -> None:
    """What tells whether a server serves may be on a file system that has a bad moment: it is tried again."""
    asked: list[int] = []

    async def serves() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise OSError(errno.ESTALE, "Stale file handle")

    states: list[State] = []
    pids: list[int] = []

    def told(name: str, state: State, pid: int, detail: str) -> None:
        states.append(state)
        pids.append(pid)

    item = Supervised(replace(command(tmp_path, "import time; time.sleep(60)"), ready=serves), told)
    task = asyncio.create_task(item.run())
    async with asyncio.timeout(20):
        while State.READY not in states:
            await asyncio.sleep(0.05)
        os.kill(pids[-1], signal.SIGKILL)
        while states.count(State.READY) < 2:
            await asyncio.sleep(0.05)
    await item.stop()
    await task

    assert len(asked) == 3


async def test_a_ready_child_that_dies_is_started_again(tmp_path: Path) -> None:
    """It comes back, and a stop ends the supervision."""
    pids: list[int] = []
    ready = asyncio.Event()

    def told(name: str, state: State, pid: int, detail: str) -> None:
        if state is State.READY:
            pids.append(pid)
            ready.set()

    item = Supervised(command(tmp_path, REPORTING), told)
    task = asyncio.create_task(item.run())
    await ready.wait()
    ready.clear()
    os.kill(pids[0], signal.SIGKILL)
    await asyncio.wait_for(ready.wait(), 10)
    await item.stop()
    await task

    assert len(set(pids)) == 2
    assert not any(children.group_alive(pid) for pid in pids)
