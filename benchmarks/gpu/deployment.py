"""Launch Baton the way a user does, ask it, read its metrics, end it, and look what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP_S = 90.0
FREED_S = 20.0
TAIL_LINES = 40


class StepError(Exception):
    """A step of a benchmark could not be done; the message is all there is to know about it on a machine that is gone."""


class TimeUpError(StepError):
    """A step took longer than it may."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment that serves the model named `m`."""

    run_dir: Path
    url: str
    key: str
    ready_s: float

    def page(self, member: str) -> str:
        """The metrics page of a member."""
        for target in targets(self.run_dir):
            if target["labels"]["member"] == member:
                return fetch(f"http://{target['targets'][0]}/metrics", self.key)
        raise StepError(f"{self.run_dir}/metrics/targets.json names no member {member!r}")

    def post(self, body: dict[str, Any], timeout_s: float = 120) -> dict[str, Any]:
        """The answer to one completion."""
        request = urllib.request.Request(
            f"{self.url}/completions",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise StepError(f"the frontend answered {error.code}: {error.read().decode(errors='replace')}") from error
        return answer


@contextlib.contextmanager
def deployed(
    work: Path, name: str, overrides: Sequence[str], env: Mapping[str, str], ready_s: float
) -> Iterator[Deployment]:
    """`python -m launch` in `work`, serving within the block; ends with Ctrl-C, and by force when that does not do it.

    Raises:
        StepError: It did not serve; brings what the launch said and the end of every engine's log.
    """
    run_dir = work / "runs" / name
    output = work / f"{name}.out"
    idle = gpu_mib()
    argv = [sys.executable, "-m", "launch", f"name={name}", f"runs_dir={work / 'runs'}", *overrides]
    begun = time.monotonic()
    with output.open("w") as file:
        process = subprocess.Popen(
            argv, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
    try:
        endpoint = wait_ready(process, run_dir, ready_s, output)
        key = (run_dir / "api_key").read_text().strip()
        yield Deployment(run_dir, endpoint["url"], key, time.monotonic() - begun)
    finally:
        _end(process, run_dir)
        wait_freed(idle)


def wait_ready(
    process: subprocess.Popen[bytes], run_dir: Path, timeout_s: float = 600, output: Path | None = None
) -> dict[str, Any]:
    """The endpoint, once it is ready.

    Raises:
        StepError: The launch ended, or is not ready in time.
    """
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        path = run_dir / "endpoint.json"
        if path.exists():
            endpoint: dict[str, Any] = json.loads(path.read_text())
            if endpoint["state"] == "ready":
                return endpoint
        time.sleep(0.2)
    how = f"not ready within {timeout_s:.0f} s" if process.poll() is None else f"ended with {process.returncode}"
    raise StepError(f"the launch of {run_dir.name}: {how}\n{tail(output) if output else ''}\n{logs(run_dir)}")


def logs(run_dir: Path) -> str:
    """The end of every engine's log."""
    found = sorted((run_dir / "logs" / "latest").glob("*-[0-9]*.log"))
    return "\n".join(f"--- {path.name}\n{tail(path)}" for path in found if not path.name.startswith("frontend"))


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a file, or that it cannot be read."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"({error})"


def _end(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Ctrl-C; then, what still names the run directory is killed, so that the next step finds its GPUs free."""
    no_more_limit()
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end_leftovers(run_dir)


def end_leftovers(folder: Path) -> None:
    """Kill what still runs from a folder of ours: its deployment has ended, or the benchmark that began it was killed."""
    for pid in processes_of(folder):
        print(f"  killed process {pid} of {folder}, which outlived its deployment", flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def no_more_limit() -> None:
    """Cleaning up must not be cut short by the time limit of what it cleans up after."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def processes_of(run_dir: Path) -> list[int]:
    """Every process of this machine, but this one, whose command line names the folder."""
    mark, found = str(run_dir).encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def wait_freed(idle_mib: int | None) -> None:
    """Wait until the GPUs hold no more than before, for a process's memory is freed a moment after its end."""
    deadline = time.monotonic() + FREED_S
    while idle_mib is not None and (gpu_mib() or 0) > idle_mib + 512 and time.monotonic() < deadline:
        time.sleep(0.5)


def targets(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics pages of all members, in Prometheus' file_sd form."""
    found: list[dict[str, Any]] = json.loads((run_dir / "metrics" / "targets.json").read_text())
    return found


def pages(run_dir: Path) -> list[str]:
    """The metrics pages of all members."""
    key = (run_dir / "api_key").read_text().strip()
    return [fetch(f"http://{item['targets'][0]}/metrics", key) for item in targets(run_dir)]


def fetch(url: str, key: str) -> str:
    """The text behind a URL that asks for a key."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def metric(page: str, name: str) -> float:
    """Sum of a metric on a page."""
    return sum(
        float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
    )


def gpu_mib() -> int | None:
    """GPU memory in use on this machine; None where there is no GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return sum(int(line) for line in done.stdout.split())


def gpu_names() -> str:
    """What the GPUs of this machine are, or that there are none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "no GPU"
    names = done.stdout.strip().splitlines()
    return ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
