"""Ray for engines with `executor: ray`: one small cluster for each engine, on its nodes, with ports of its own.

Node 0 starts Ray's head and the engine in it, the others join; all of it ends with the members' processes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launch.errors import ConfigError, DeploymentError
from launch.plan import Member, Plan
from slurm.children import report
from workers.engine.arguments import Place

log = logging.getLogger(__name__)

# Ray's servers on a node, in the order of `MemberPorts.ray`. The ports of its workers and agents that are not named here
# are free ones that they find themselves.
GCS, NODE_MANAGER, OBJECT_MANAGER, RUNTIME_ENV, METRICS, AGENT_GRPC, AGENT_HTTP = range(7)
POLL_S = 0.5
STOP_S = 20.0


def require_ray() -> None:
    """Refuse where Ray is missing.

    Raises:
        ConfigError: Says how to install it, and what to use instead.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "executor=ray needs the Python package 'ray', which this environment lacks: pip install 'ray[cgraph]>=2.55', "
            "or use executor=mp, which needs no Ray"
        )


def start_command(plan: Plan, member: Member, places: Mapping[int, Place], temp_dir: str) -> tuple[str, ...]:
    """The `ray start` of a member: the head on node 0 of the engine, else a node that joins it."""
    place, head = places[member.rank], plan.leader_of(member.engine)
    port = member.ports.ray
    shared = (
        f"--node-ip-address={place.address}",
        f"--num-gpus={len(member.slots)}",
        f"--node-manager-port={place.port(port + NODE_MANAGER)}",
        f"--object-manager-port={place.port(port + OBJECT_MANAGER)}",
        f"--runtime-env-agent-port={place.port(port + RUNTIME_ENV)}",
        f"--metrics-export-port={place.port(port + METRICS)}",
        f"--dashboard-agent-grpc-port={place.port(port + AGENT_GRPC)}",
        f"--dashboard-agent-listen-port={place.port(port + AGENT_HTTP)}",
        "--disable-usage-stats",
        "--block",
    )
    start = (sys.executable, "-m", "ray.scripts.scripts", "start")
    if member.node:
        return (*start, f"--address={address(plan, member, places)}", *shared)
    return (
        *start,
        "--head",
        f"--port={places[head.rank].port(port + GCS)}",
        "--include-dashboard=false",
        f"--temp-dir={temp_dir}",
        *shared,
    )


def address(plan: Plan, member: Member, places: Mapping[int, Place]) -> str:
    """Where the head of a member's cluster is, as host:port."""
    head = plan.leader_of(member.engine)
    place = places[head.rank]
    return f"{place.address}:{place.port(head.ports.ray + GCS)}"


def temp_dir() -> str:
    """Ray's folder: in the member's own scratch folder, so that it goes with the member."""
    return str(Path(os.environ.get("TMPDIR", "/tmp")) / "ray")


@contextlib.contextmanager
def head(command: Sequence[str], at: str, timeout_s: float) -> Iterator[None]:
    """Ray's head as a child of this process; vLLM finds it by RAY_ADDRESS.

    Raises:
        DeploymentError: It ended, or did not answer in time.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        _wait_for(at, timeout_s, process)
        os.environ["RAY_ADDRESS"] = at
        yield
    finally:
        _end(process)


def join(command: Sequence[str], timeout_s: float) -> int:
    """Be a node of the cluster until a signal ends this process, or until Ray ends, which returns 1."""
    at = next(word.partition("=")[2] for word in command if word.startswith("--address="))
    _wait_for(at, timeout_s, None)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        report("ready")
        code = process.wait()
        log.error("ray ended with code %d", code)
        return 1
    finally:
        _end(process)


def _wait_for(at: str, timeout_s: float, process: subprocess.Popen[bytes] | None) -> None:
    host, _, port = at.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=POLL_S):
            return
        if process is not None and process.poll() is not None:
            raise DeploymentError(f"ray ended with code {process.returncode} before it served at {at}")
        time.sleep(POLL_S)
    raise DeploymentError(f"no Ray head answers at {at} after {timeout_s:.0f} s: see the log of node 0 of the engine")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
