"""Launch real deployments from tests, the way a user does, and look at what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from launch.records import Endpoint, Phase, RunDirectory

READY_S = 240


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment that serves."""

    run: RunDirectory
    endpoint: Endpoint
    launcher: subprocess.Popen[str]
    output_file: Path
    client: OpenAI
    """The official client, pointed at it; errors are not tried again."""
    http: httpx.Client
    """A plain client with the key, for what the official one cannot send."""

    @property
    def output(self) -> str:
        """What the launching command has printed."""
        return self.output_file.read_text()

    def pids(self) -> dict[str, int]:
        """Process of each member."""
        job = self.run.job()
        assert job
        return {
            name: member.pid for rank in self.run.ranks(job.attempt).values() for name, member in rank.members.items()
        }

    def metric(self, member: str, name: str, **labels: str) -> float:
        """Sum of a metric over its other labels, on a member's page."""
        pages = {item["labels"]["member"]: item["targets"][0] for item in targets(self.run)}
        total = 0.0
        for line in self.http.get(f"http://{pages[member]}/metrics").text.splitlines():
            if line.startswith((f"{name} ", f"{name}{{")) and all(f'{key}="{labels[key]}"' in line for key in labels):
                total += float(line.rpartition(" ")[2])
        return total


def targets(run: RunDirectory) -> list[dict[str, Any]]:
    """The content of metrics/targets.json."""
    found: list[dict[str, Any]] = json.loads(run.targets_file.read_text())
    return found


@contextlib.contextmanager
def deployed(
    folder: Path, *overrides: str, name: str, env: Mapping[str, str] | None = None, ready_s: float = READY_S
) -> Iterator[Deployment]:
    """Launch with `python -m launch`, wait until it serves, and end it with Ctrl-C."""
    process, output = start(folder, *overrides, name=name, env=env)
    run = RunDirectory(folder / "runs" / name)
    try:
        endpoint = _ready(run, process, output, ready_s)
        with (
            OpenAI(base_url=endpoint.url, api_key=run.api_key(), max_retries=0, timeout=120) as client,
            httpx.Client(headers={"Authorization": f"Bearer {run.api_key()}"}, timeout=60) as http,
        ):
            yield Deployment(run, endpoint, process, output, client, http)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def start(
    folder: Path, *overrides: str, name: str, env: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[str], Path]:
    """Start the launching command; returns it and the file with its output."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{name}.out"
    with output.open("w") as file:
        process = subprocess.Popen(
            command(folder, *overrides, name=name),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            text=True,
            start_new_session=True,
        )
    return process, output


def command(folder: Path, *overrides: str, name: str) -> list[str]:
    """The command line of a launch whose files stay in the folder."""
    here = [f"name={name}", f"runs_dir={folder / 'runs'}"]
    return [sys.executable, "-m", "launch", *overrides, *here]


def _ready(run: RunDirectory, process: subprocess.Popen[str], output: Path, ready_s: float) -> Endpoint:
    deadline = time.monotonic() + ready_s
    while time.monotonic() < deadline:
        endpoint = run.endpoint()
        if endpoint and endpoint.state is Phase.READY:
            return endpoint
        if process.poll() is not None:
            raise AssertionError(f"the launch ended with {process.returncode}:\n{output.read_text()}")
        time.sleep(0.1)
    raise AssertionError(f"not ready within {ready_s} s:\n{output.read_text()}")


def processes_of(run: RunDirectory) -> dict[int, str]:
    """Every process on this machine whose command line or environment names the run directory."""
    found = {}
    mark = str(run.path).encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes()
            if mark in line or mark in (entry / "environ").read_bytes():
                found[int(entry.name)] = line.replace(b"\0", b" ").decode(errors="replace")[:200]
    return found


def children(pid: int) -> dict[str, int]:
    """The children of a process, by the names that vLLM gives its processes."""
    found: dict[str, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid:
                    found[(entry / "cmdline").read_bytes().split(b"\0")[0].decode().strip()] = int(entry.name)
    return found
