"""Plain engines with the very arguments and environment that Baton would give them, started without Baton."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.deployment import StepError, gpu_mib, no_more_limit, tail, wait_freed
from launch import compose
from launch.plan import Member, plan
from launch.recipe import Kind, Recipe
from slurm import ports
from slurm.hosts import devices_here
from slurm.places import Place
from workers.engine.arguments import engine_arguments, engine_environment

ADDRESS = "127.0.0.1"
END_S = 20.0


@dataclass(frozen=True, slots=True)
class BareEngine:
    """A plain engine that serves on a port of this machine."""

    kind: Kind
    port: int

    def ask(self, message: dict[str, Any], timeout_s: float = 120) -> list[Any]:
        """Send one request and return every line of the answer."""
        with socket.create_connection((ADDRESS, self.port), timeout_s) as connection:
            connection.sendall(json.dumps(message).encode() + b"\n")
            with connection.makefile("rb") as lines:
                return [json.loads(line) for line in lines]

    def generate(self, prompt: list[int], tokens: int, transfer: dict[str, Any] | None) -> dict[str, Any]:
        """One leg; its last line.

        Raises:
            StepError: The engine did not serve it.
        """
        sampling = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        lines = self.ask({"op": "generate", "prompt": prompt, "sampling": sampling, "transfer": transfer})
        last: dict[str, Any] = lines[-1] if lines else {"error": "the engine closed the connection"}
        if last.get("error"):
            raise StepError(f"bare {self.kind}: {last['error']}")
        return last

    def page(self) -> str:
        """vLLM's own counters."""
        return str(self.ask({"op": "metrics"})[0])


@contextlib.contextmanager
def bare_engines(
    work: Path,
    name: str,
    overrides: Sequence[str],
    env: Mapping[str, str],
    ready_s: float,
    *,
    extra_config: Mapping[str, Any] | None = None,
    log_stats: bool = False,
) -> Iterator[tuple[list[BareEngine], float]]:
    """The engines of a recipe, up within the block, and the seconds that took.

    `extra_config` goes into the KV connector's own configuration; `log_stats` turns vLLM's counters on.

    Raises:
        StepError: One of them did not come up; brings the end of its log.
    """
    recipe = compose.read([f"name={name}", f"runs_dir={work / 'runs'}", *overrides]).recipe
    folder = work / "bare" / name
    folder.mkdir(parents=True, exist_ok=True)
    idle, begun = gpu_mib(), time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    with ports.claim(f"bare {name}", 0) as block:
        try:
            engines = []
            for member in plan(recipe).members:
                arguments = _arguments(recipe, member, block.base, extra_config or {}) | {"log_stats": log_stats}
                engines.append(BareEngine(member.kind, block.base + member.ports.requests))
                processes.append(_start(recipe, member, arguments, block.base, folder, env))
            _wait_ready(processes, [folder / f"{member.name}.log" for member in plan(recipe).members], ready_s)
            yield engines, time.monotonic() - begun
        finally:
            _end(processes)
            wait_freed(idle)


def _arguments(recipe: Recipe, member: Member, base: int, extra_config: Mapping[str, Any]) -> dict[str, Any]:
    arguments = engine_arguments(recipe, plan(recipe), member, {0: Place(ADDRESS, base)})
    arguments.pop("kv_events_config", None)  # Baton's router listens to them; here nobody would
    transfer = arguments.get("kv_transfer_config")
    if transfer and extra_config:
        extra = transfer.get("kv_connector_extra_config", {}) | dict(extra_config)
        arguments = arguments | {"kv_transfer_config": transfer | {"kv_connector_extra_config": extra}}
    return arguments


def _start(
    recipe: Recipe, member: Member, arguments: dict[str, Any], base: int, folder: Path, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    written = folder / f"{member.name}.json"
    written.write_text(json.dumps(arguments))
    own = engine_environment(recipe, member, Place(ADDRESS, base), devices_here())
    argv = [sys.executable, "-m", "benchmarks.gpu.bare_engine", str(written), str(base + member.ports.requests)]
    with (folder / f"{member.name}.log").open("w") as log:
        return subprocess.Popen(
            argv,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**env, **own},
            start_new_session=True,
        )


def _wait_ready(processes: list[subprocess.Popen[bytes]], log_paths: list[Path], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    waiting = list(zip(processes, log_paths, strict=True))
    while waiting:
        waiting = [item for item in waiting if not any(line == "ready" for line in _lines(item[1]))]
        ended = [(process, path) for process, path in waiting if process.poll() is not None]
        if ended or (waiting and time.monotonic() > deadline):
            process, path = (ended or waiting)[0]
            how = f"ended with {process.poll()}" if ended else f"was not ready within {timeout_s:.0f} s"
            raise StepError(f"bare {path.stem} {how}\n{tail(path)}")
        time.sleep(0.2)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    no_more_limit()
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group, for an engine core may outlive its parent
        process.wait()
