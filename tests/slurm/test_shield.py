"""A shielded process does not leave when Slurm says so, only when its agent or a person does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import children

# A vLLM engine in small: a process that embeds, one that it forks, and one that it spawns, each with handlers of its own.
SERVING = """
import multiprocessing, os, signal, sys, time
from slurm import shield

def said(signum, frame):
    print(name, "leaves", flush=True)
    os._exit(0)

def serve(this):
    global name
    name = this
    shield.hear()
    signal.signal(signal.SIGTERM, said)
    signal.signal(signal.SIGINT, said)
    print(name, "serves", os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    shield.hear_with_multiprocessing()
    fork = multiprocessing.get_context("fork").Process(target=serve, args=("fork",))
    fork.start()
    spawn = multiprocessing.get_context("spawn").Process(target=serve, args=("spawn",))
    spawn.start()
    serve("main")
"""
IDLE = "import time; from slurm import shield; shield.hear(); print('x serves', flush=True); time.sleep(60)"
# As Slurm does: a process named so signals others, and is there as long as they are.
STEP_DAEMON = """
import os, signal, sys
open("/proc/self/comm", "w").write("slurmstepd")
for pid in sys.argv[1:]:
    os.kill(int(pid), signal.SIGTERM)
print("signalled", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def cancelled(*pids: int) -> Iterator[None]:
    """SIGTERM from Slurm, which is still there within the block."""
    argv = [sys.executable, "-c", STEP_DAEMON, *map(str, pids)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout
        assert daemon.stdout.readline() == b"signalled\n"
        yield


async def started(tmp_path: Path, code: str, processes: int) -> tuple[children.Child, dict[str, int]]:
    """A shielded child whose processes serve, and their pids by name."""
    script = tmp_path / "serving.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = await children.start(
        "child", [sys.executable, str(script)], env, tmp_path / "log", None, tmp_path, shielded=True
    )
    while len(lines(tmp_path, "serves")) < processes:
        await asyncio.sleep(0.02)
    return child, {line.split()[0]: int(line.split()[-1]) for line in lines(tmp_path, "serves") if processes > 1}


def lines(tmp_path: Path, word: str) -> list[str]:
    """What the child's log has with the word."""
    return [line for line in (tmp_path / "log").read_text().splitlines() if word in line]


async def test_no_process_of_an_engine_leaves_for_slurm(tmp_path: Path) -> None:
    """Neither the one that embeds it nor what that forks and spawns; a SIGTERM from anybody else each of them obeys."""
    child, pids = await started(tmp_path, SERVING, 3)
    with cancelled(*pids.values()), cancelled(*pids.values()):
        await asyncio.sleep(0.5)  # what must not happen has no moment to wait for
        untouched = lines(tmp_path, "leaves")
    for name in ("spawn", "fork", "main"):
        os.kill(pids[name], signal.SIGTERM)
        while f"{name} leaves" not in lines(tmp_path, "leaves"):
            await asyncio.sleep(0.02)
    code = await child.stop(10)

    assert set(pids) == {"main", "fork", "spawn"}
    assert untouched == []
    assert code == 0


async def test_the_agents_wish_comes_through_among_slurms(tmp_path: Path) -> None:
    """The kernel keeps one SIGTERM of many that wait, so the agent's is another signal: no moment loses it."""
    child, pids = await started(tmp_path, SERVING, 3)
    os.kill(pids["main"], signal.SIGSTOP)  # a busy machine
    with cancelled(pids["main"]):
        stopping = asyncio.ensure_future(child.stop(20))
        await asyncio.sleep(0.2)
        os.kill(pids["main"], signal.SIGCONT)
        code = await stopping

    assert code == 0
    assert "main leaves" in lines(tmp_path, "leaves")


@pytest.mark.parametrize("by", ["the agent", "somebody"])
async def test_without_a_handler_a_signal_ends_the_process(tmp_path: Path, by: str) -> None:
    """As SIGTERM ends any: while it starts, nothing of it has to be saved. Slurm's does not even then."""
    child, _ = await started(tmp_path, IDLE, 1)
    with cancelled(child.pid):
        await asyncio.sleep(0.2)  # as above
        alive = children.group_alive(child.pid)
    if by == "somebody":
        os.kill(child.pid, signal.SIGTERM)
        code = await asyncio.wait_for(child.wait(), 20)
        await child.clean()
    else:
        code = await child.stop(20)

    assert alive
    assert code == -signal.SIGTERM
