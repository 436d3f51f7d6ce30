"""The servers under test, each started for a block: our own as a user launches it, and the peers.

The peers come from `peers.sh`; their options are those of their own documentation, with what they need to run without a
GPU and without a control plane. All serve the same tiny model folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.deployments import deployed
from tests.reference import CPU_ENV

READY_S = 240.0
STOP_S = 20.0
MODEL = "tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server that serves. `frontends` and `workers` are its processes."""

    name: str
    port: int
    frontends: tuple[int, ...]
    workers: tuple[int, ...] = ()
    key: str = ""


@contextlib.contextmanager
def baton(folder: Path, *overrides: str, name: str = "baton", recipe: str = "tiny_agg") -> Iterator[Target]:
    """Our own deployment, with echo engines unless the overrides say otherwise."""
    given = (f"+recipe={recipe}", "engine.backend=echo", f"model.path=tiny:{folder / MODEL}", *overrides)
    with deployed(folder, *given, name=name) as running:
        pids = running.pids()
        yield Target(
            name="baton",
            port=int(running.endpoint.url.removesuffix("/v1").rpartition(":")[2]),
            frontends=tuple(pid for member, pid in pids.items() if member.startswith("frontend")),
            workers=tuple(pid for member, pid in pids.items() if member.startswith(("agg", "pre", "dec"))),
            key=running.run.api_key(),
        )


@contextlib.contextmanager
def dynamo(folder: Path, peers: Path, speedup: float, router: str = "round-robin") -> Iterator[Target]:
    """NVIDIA Dynamo's frontend before one mocker; at a speed-up of 1 that takes about 10 ms for a step, at 0 none."""
    python = peers / "dynamo" / "bin" / "python"
    port, store = free_port(), folder / f"dynamo-{time.time_ns()}"
    store.mkdir()
    planes = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")
    mocker = (
        *(python, "-m", "dynamo.mocker", "--model-path", folder / MODEL, "--model-name", MODEL),
        *("--speedup-ratio", speedup, "--num-workers", 1, *planes),
    )
    frontend = (python, "-m", "dynamo.frontend", "--http-port", port, "--router-mode", router, *planes)
    env = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(store),
        "DYN_LOG": "warn",
        "HF_HUB_OFFLINE": "1",
        "NATS_SERVER": "",
    }
    with process(mocker, store / "mocker.log", env) as worker, process(frontend, store / "frontend.log", env) as front:
        lists_model(port, front, store / "frontend.log")
        yield Target(name="dynamo", port=port, frontends=(front.pid,), workers=(worker.pid,))


@contextlib.contextmanager
def smg(folder: Path, peers: Path, behind: Target) -> Iterator[Target]:
    """The gateway smg before another server, whose key its clients send."""
    port, log = free_port(), folder / f"smg-{time.time_ns()}.log"
    argv = (
        *(peers / "smg" / "bin" / "smg", "launch", "--worker-urls", f"http://127.0.0.1:{behind.port}"),
        *("--host", "127.0.0.1", "--port", port, "--policy", "round_robin", "--prometheus-port", free_port()),
        *("--api-key", behind.key) * bool(behind.key),
    )
    with process(argv, log) as gateway:
        lists_model(port, gateway, log, behind.key)
        # The command may be a Python wrapper that runs the gateway as its child.
        yield Target(name="smg", port=port, frontends=family(gateway.pid), workers=behind.frontends, key=behind.key)


@contextlib.contextmanager
def vllm(folder: Path, options: Sequence[str]) -> Iterator[Target]:
    """vLLM's own API server; its engine core is a process of its own and not among the target's."""
    port, log = free_port(), folder / f"vllm-{time.time_ns()}.log"
    argv = (
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / MODEL),
        *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", port, *options),
    )
    with process(argv, log, {**CPU_ENV, "HF_HUB_OFFLINE": "1"}) as server:
        lists_model(port, server, log)
        yield Target(name="vllm", port=port, frontends=(server.pid,))


@contextlib.contextmanager
def process(
    argv: Sequence[object], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child and its children in a group of their own, ended with the block."""
    with log.open("wb") as file:
        child = subprocess.Popen(
            [str(item) for item in argv],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 15)
        try:
            child.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()


def lists_model(port: int, child: subprocess.Popen[bytes], log: Path, key: str = "") -> None:
    """Wait until the server lists the model.

    Raises:
        RuntimeError: It ended, or did not in time; with the end of its log.
    """
    deadline = time.monotonic() + READY_S
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {key}"})
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if MODEL.encode() in answer.read():
                return
        time.sleep(0.2)
    raise RuntimeError(f"{child.args!r} does not serve; the end of its log:\n{log.read_text(errors='replace')[-2000:]}")


def family(pid: int) -> tuple[int, ...]:
    """A process and its children."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return tuple(found)


def free_port() -> int:
    """A port that is free now, below the range of outgoing connections so that none of those takes it."""
    for port in range(18400 + os.getpid() % 1000, 20000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                if port not in _given:
                    _given.add(port)
                    return port
    raise RuntimeError("no free port between 18400 and 20000")


_given: set[int] = set()
