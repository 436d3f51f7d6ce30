"""Chains of jobs on a real Slurm: nobody notices the hand-over, and what ends a link, or forbids the next, is understood."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from openai import OpenAI

from launch.chain import Chain
from launch.records import Phase, RunDirectory
from tests.deployments import command, processes_of
from tests.reference import complete
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

SHAPE = ("+recipe=tiny_disagg", "engine.backend=echo", "cluster=slurm_cpu", "cluster.interface=lo", "wait=false")
ONE_NODE = ("+recipe=tiny_agg", *SHAPE[1:])


def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Wait for it, or fail."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def state(run: RunDirectory) -> Phase | None:
    """What an endpoint says."""
    endpoint = run.endpoint()
    return endpoint.state if endpoint else None


def how(run: RunDirectory) -> str:
    """How the first attempt in a run directory ended."""
    life = run.life(1)
    return life.how if life else ""


class Operator:
    """Somebody on a login node of the cluster."""

    def __init__(self, folder: Path, cluster: SlurmCluster) -> None:
        self.folder = folder
        self.cluster = cluster
        self.env = {**os.environ, **cluster.env}

    def launch(self, *words: str, name: str) -> subprocess.CompletedProcess[str]:
        """`python -m launch`."""
        argv = command(self.folder, *words, name=name)
        return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120, env=self.env)

    def do(self, what: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`python -m launch.<what>`."""
        argv = [sys.executable, "-m", f"launch.{what}", *words, "--runs-dir", str(self.folder / "runs")]
        return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=150, env=self.env)

    def told(self, what: str, *words: str) -> Any:
        """What a command says to programs."""
        return json.loads(self.do(what, *words, "--json").stdout)

    def queue(self, form: str = "%i %T") -> list[str]:
        """Jobs as squeue has them."""
        return self.cluster.run("squeue", "--noheader", "--sort=i", f"--format={form}").splitlines()

    @contextlib.contextmanager
    def gateway(self, name: str) -> Iterator[str]:
        """A gateway; yields its URL."""
        argv = [sys.executable, "-m", "launch.gateway", name, "--runs-dir", str(self.folder / "runs")]
        with (self.folder / "gateway.log").open("w") as log:
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, env=self.env)
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()


@pytest.fixture
def operator(tmp_path: Path, cluster: SlurmCluster) -> Iterator[Operator]:
    """Somebody who leaves no job behind, whatever a test did."""
    someone = Operator(tmp_path, cluster)
    yield someone
    for stop in (tmp_path / "runs").glob("*/chain.json"):
        (stop.parent / "stop").touch()
    jobs = [line.split()[0] for line in someone.queue()]
    if jobs:
        cluster.run("scancel", *jobs)
    until(lambda: someone.queue() == [])


class Load:
    """Clients that ask without a pause, by streams and at once; `failed` has what any of them saw go wrong."""

    def __init__(self, url: str, key: str, clients: int = 6) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self._over = threading.Event()
        self._url, self._key = url, key
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with OpenAI(base_url=self._url, api_key=self._key, max_retries=0, timeout=60) as client:
            while not self._over.wait(number / 50):
                try:
                    answer = complete(client, f"client {number}", bool(number % 2))
                    assert answer.completion_tokens == 40
                    self.answered += 1
                except Exception as error:  # noqa: BLE001  # whatever a client sees counts
                    self.failed.append(repr(error))


def long_answer(url: str, key: str) -> list[str]:
    """A stream of 160 tokens; returns its events."""
    body = {"model": "tiny", "prompt": "long", "max_tokens": 160, "stream": True, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{url}/completions", json=body, headers=headers, timeout=60) as answer:
        return [line for line in answer.iter_lines() if line]


def test_no_request_fails_when_the_next_job_takes_over(tmp_path: Path, tiny_model: Path, operator: Operator) -> None:
    """Two jobs under constant load through the gateway: the second is submitted from inside the first, serves when it is
    ready, and nobody notices. A stream at the old one ends whole; who asks that one once its grace is over is told where to go.
    """
    words = (*SHAPE, f"model.path=tiny:{tiny_model}", "chain=2", "slurm.time_min=2", "engine.drain_s=9")
    more = ("engine.echo_interval_s=0.05", "handover.grace_s=2", "handover.margin_s=90")
    chain = Chain(tmp_path / "runs" / "row")
    first, second = chain.link(1), chain.link(2)
    launched = operator.launch(*words, *more, name="row")
    assert launched.returncode == 0, launched.stderr
    until(lambda: state(first) is Phase.READY)
    key, old = RunDirectory(chain.path).api_key(), first.endpoint()
    assert old
    events: list[str] = []
    with operator.gateway("row") as url, Load(url, key) as load:
        taken = operator.launch(*words, *more, name="row")
        until(lambda: (chain.endpoint() or old).url != old.url)
        answered_before = load.answered
        streaming = threading.Thread(target=lambda: events.extend(long_answer(old.url, key)))
        streaming.start()
        both = operator.told("status", "row")["chain"]["links"]
        until(lambda: first.moved() is not None)
        until(lambda: state(first) is not Phase.READY)
        body = {"model": "tiny", "prompt": "too late", "max_tokens": 4}
        asked = httpx.post(f"{old.url}/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        streaming.join()
        until(lambda: how(first) != "" and len(operator.queue()) == 1)
        until(lambda: load.answered > answered_before + 30 or load.failed)
    new = chain.endpoint()
    assert new
    listed = operator.told("list")
    stopped = operator.do("stop", "row")
    history = operator.told("history", "row")

    assert load.failed == []
    assert answered_before > 0
    assert [(link["link"], link["serving"]) for link in both] == [(1, False), (2, True)]
    assert "a deployment named 'row' is running (row/links/1, Slurm job" in taken.stderr
    assert (asked.status_code, asked.headers["retry-after"]) == (503, "5")
    assert asked.json()["error"]["message"] == f"the deployment is stopping: {new.url} serves instead"
    assert len(events) == 161
    assert events[-1] == "data: [DONE]"
    assert [(item["name"], item["link"], item["state"], item["endpoint"]) for item in listed] == [
        ("row", 2, "ready", new.url)
    ]
    assert 0 < listed[0]["seconds_left"] <= 120
    assert stopped.stdout == "row stopped\n", stopped.stderr
    assert [(item["link"], item["nodes"], item["how"]) for item in history] == [(1, 2, "replaced"), (2, 2, "stopped")]
    assert all(0.001 < item["node_hours"] < 0.1 for item in history)
    assert operator.queue() == []
    for run in (first, second):
        assert all(record.ended and not record.failure for record in run.ranks(1).values())
        assert run.api_key() == key
    assert not processes_of(RunDirectory(chain.path))
