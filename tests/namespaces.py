"""Network namespaces as the nodes of a deployment, on a bridge that can be told to pass nothing: `launcher=allocation` in them.

Slurm starts all its nodes in one network on this machine, so a stand-in takes srun's place: `python -m tests.namespaces` starts
one task in each namespace, under a host name of its own, with the variables that a task reads. All else is as in a job.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

NODES = "BATON_TEST_NODES"
SRUN = f'#!/bin/sh\nexec "{sys.executable}" -m tests.namespaces "$@"\n'


def can_make_nodes() -> bool:
    """Whether this machine lets us make network namespaces and bridges."""
    return os.geteuid() == 0 and shutil.which("bridge") is not None


class Nodes:
    """Nodes by number; their interface is eth0, and this machine reaches all of them."""

    def __init__(self, tag: str, count: int) -> None:
        self.names = [f"{tag}{number}" for number in range(count)]

    def cut_off(self, one: int) -> None:
        """Nothing gets to a node or from it; its link stays up."""
        self._port(one, "0")

    def mend(self) -> None:
        """Everything gets everywhere again."""
        for number in range(len(self.names)):
            self._port(number, "3")

    def environment(self, folder: Path) -> Mapping[str, str]:
        """What a launch needs for `launcher=allocation` to find them; srun's stand-in is written to the folder."""
        folder.mkdir(parents=True)
        srun = folder / "srun"
        srun.write_text(SRUN)
        srun.chmod(0o700)
        number = str(len(self.names))
        path = f"{folder}:{os.environ['PATH']}"
        return {"PATH": path, NODES: " ".join(self.names), "SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": number}

    def _port(self, number: int, state: str) -> None:
        """Let the bridge's port of a node pass everything (3) or nothing (0)."""
        _run("bridge", "link", "set", "dev", self.names[number], "state", state)


@contextlib.contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """That many namespaces on a bridge."""
    tag = f"bn{os.getpid() % 100000}"
    net = f"10.79.{os.getpid() % 256}"
    found = Nodes(tag, count)
    with contextlib.ExitStack() as stack:
        bridge = f"{tag}b"
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(_run, "ip", "link", "del", bridge)
        _run("ip", "addr", "add", f"{net}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for number, name in enumerate(found.names):
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "del", name)
            _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "link", "set", name, "master", bridge, "up")
            _run("ip", "-n", name, "addr", "add", f"{net}.{number + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _run("ip", "-n", name, "link", "set", device, "up")
        yield found


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def main() -> int:
    """Be srun: one task on each node, signals to all of them, and the highest of their exit codes."""
    names = os.environ[NODES].split()
    options = list(sys.argv[1:])
    while options[0].startswith("-"):
        options.pop(0)
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": ",".join(names), "SLURM_NTASKS": str(len(names))}
    tasks = []
    for rank, name in enumerate(names):
        argv = [
            "ip",
            "netns",
            "exec",
            name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {name} && exec "$@"',
            "task",
            *options,
        ]
        env = os.environ | step | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURMD_NODENAME": name}
        tasks.append(subprocess.Popen(argv, env=env))

    def pass_on(number: int, frame: FrameType | None) -> None:
        for task in tasks:
            task.send_signal(number)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, pass_on)
    return max(task.wait() for task in tasks)


if __name__ == "__main__":
    sys.exit(main())
