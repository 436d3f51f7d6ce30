"""Chains of jobs on a real Slurm: nobody notices the hand-over, and what ends a link, or forbids the next, is understood."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from openai import OpenAI

from launch.chain import Chain
from launch.records import Phase, RunDirectory
from tests.deployments import command, processes_of, start
from tests.reference import complete
from tests.slurm.test_jobs import state, until
from tests.slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = pytest.mark.slurm

SHAPE = ("+recipe=tiny_disagg", "engine.backend=echo", "cluster=slurm_cpu", "cluster.interface=lo", "wait=false")
ONE_NODE = ("+recipe=tiny_agg", *SHAPE[1:])


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
    def gateway(self, *words: str) -> Iterator[str]:
        """A gateway; yields its URL."""
        argv = [sys.executable, "-m", "launch.gateway", *words, "--runs-dir", str(self.folder / "runs")]
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


def long_answer(url: str, key: str, events: list[str]) -> None:
    """A stream of 160 tokens; keeps its events as they come."""
    body = {"model": "tiny", "prompt": "long", "max_tokens": 160, "stream": True, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{url}/completions", json=body, headers=headers, timeout=60) as answer:
        for line in answer.iter_lines():
            if line:
                events.append(line)


def test_no_request_fails_when_the_next_job_takes_over(tmp_path: Path, tiny_model: Path, operator: Operator) -> None:
    """Two jobs under constant load through the gateway: the second is submitted from inside the first, serves when it is
    ready, and nobody notices. A stream at the old one ends whole; who asks that one once its grace is over is told where to go.
    """
    words = (*SHAPE, f"model.path=tiny:{tiny_model}", "chain=2", "slurm.time_min=2", "engine.drain_s=9")
    more = ("engine.echo_interval_s=0.05", "handover.grace_s=2", "handover.margin_s=80")
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
        streaming = threading.Thread(target=long_answer, args=(old.url, key, events))
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


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("partition", ["spare", "spare_requeue"])
def test_a_preempted_link_is_followed_by_the_next_as_soon_as_there_are_nodes(
    tmp_path: Path, tiny_model: Path, operator: Operator, partition: str
) -> None:
    """Whether the partition cancels or requeues: the link finishes what it has within the grace, the next one, which was to
    begin much later, waits for nodes from that moment on, and requests that wait at the gateway are answered by it."""
    words = (*ONE_NODE, f"model.path=tiny:{tiny_model}", "chain=3", "slurm.time_min=30", "engine.drain_s=9")
    more = (f"slurm.partition={partition}", "engine.echo_interval_s=0.05")
    chain = Chain(tmp_path / "runs" / "pushed")
    first, second = chain.link(1), chain.link(2)
    assert operator.launch(*words, *more, name="pushed").returncode == 0
    until(lambda: state(first) is Phase.READY)
    until(lambda: len(operator.queue()) == 2)
    waits = operator.queue("%i %T %r")
    key, events = RunDirectory(chain.path).api_key(), list[str]()
    old = first.endpoint()
    assert old
    streaming = threading.Thread(target=long_answer, args=(old.url, key, events))
    with operator.gateway("pushed", "--wait=90") as url, OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        streaming.start()
        until(lambda: events)
        urgent = operator.cluster.run(
            *("sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive"),
            *("--wrap=sleep 5", "--output=/dev/null"),
        ).strip()
        until(lambda: state(first) in (Phase.DRAINING, Phase.STOPPED))
        answer = complete(client, "in the gap", True)
        streaming.join()
    history = operator.told("history", "pushed")

    assert re.fullmatch(r"\d+ PENDING BeginTime", waits[1])
    assert len(events) == 161
    assert answer.completion_tokens == 40
    assert [(item["link"], item["how"]) for item in history][:2] == [(1, "preempted"), (2, "running")]
    assert urgent not in [line.split()[0] for line in operator.queue()]
    assert all(record.ended and not record.failure for record in first.ranks(1).values())
    assert state(second) is Phase.READY


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_requeued_job_does_not_take_its_earlier_life_for_the_present(
    tmp_path: Path, tiny_model: Path, operator: Operator
) -> None:
    """Slurm refuses to requeue our jobs; one whose script was changed to allow it says why it will not serve."""
    words = (*ONE_NODE, f"model.path=tiny:{tiny_model}", "slurm.time_min=5", "engine.drain_s=5")
    shown = operator.launch(*words, "dry_run=true", name="again").stdout
    text = shown.partition("# batch script\n")[2].partition("\n# frontend-0")[0]
    script = tmp_path / "job.sh"
    run = RunDirectory(tmp_path / "runs" / "again")
    operator.launch(*words, name="ours")
    ours = (RunDirectory(tmp_path / "runs" / "ours").job() or pytest.fail("not submitted")).id
    script.write_text(text.replace("--no-requeue", "--requeue"))
    theirs = operator.cluster.run("sbatch", "--parsable", str(script)).strip()
    until(lambda: run.path.exists() and state(run) is Phase.READY)
    with pytest.raises(RuntimeError) as refused:
        operator.cluster.run("scontrol", "requeue", ours)
    operator.cluster.run("scontrol", "requeue", theirs)
    log = run.logs(1) / f"{theirs}_0_log.out"
    until(lambda: "was requeued" in log.read_text(), 150)  # Slurm lets a requeued job wait for two minutes
    until(lambda: not any(line.startswith(f"{theirs} ") for line in operator.queue()))

    assert "disabled" in str(refused.value)
    assert f"error: job {theirs} was requeued, and again has the records of its earlier life" in log.read_text()
    assert state(run) is Phase.STOPPED
    assert state(RunDirectory(tmp_path / "runs" / "ours")) is Phase.READY


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_full_queue_is_said_in_time(tmp_path: Path, tiny_model: Path) -> None:
    """sbatch goes on asking for two minutes without a word; and nothing is left that could take the name."""
    with slurm_cluster(tmp_path / "slurm", nodes=1, max_jobs=1) as full:
        someone = Operator(tmp_path, full)
        begun = time.monotonic()
        done = someone.launch(*ONE_NODE, f"model.path=tiny:{tiny_model}", "chain=2", name="late")
        took_s = time.monotonic() - begun
        status = someone.do("status", "late")

    assert done.returncode == 1
    assert "Slurm's queue is full" in done.stderr
    assert "squeue --me" in done.stderr
    assert took_s < 70
    assert "no deployment named 'late'" in status.stderr


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_what_waits_says_why_and_a_chain_that_is_stopped_takes_its_next_link_along(
    tmp_path: Path, tiny_model: Path, operator: Operator
) -> None:
    """A deployment that waits behind another shows Slurm's reason and estimate; side by side they do not meet; the name of a
    stopped chain is free again, its links count on."""
    chain = Chain(tmp_path / "runs" / "one")
    words = (*ONE_NODE, f"model.path=tiny:{tiny_model}", "engine.drain_s=5")
    assert operator.launch(*words, "chain=2", "slurm.time_min=10", name="one").returncode == 0
    assert operator.launch(*words, "slurm.exclusive=true", name="two").returncode == 0
    two = RunDirectory(tmp_path / "runs" / "two")
    until(lambda: state(chain.link(1)) is Phase.READY and state(two) is Phase.READY)
    until(lambda: chain.link(2).job() is not None)
    busy = operator.cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--wrap=sleep 60", "--time=2", "--output=/dev/null"
    ).strip()
    assert operator.launch(*words, "slurm.exclusive=true", name="three").returncode == 0
    until(lambda: "expected to start" in operator.do("status", "three").stdout, 90)
    waits = operator.do("status", "three").stdout
    listed = {item["name"]: item["state"] for item in operator.told("list")}
    endpoints = {run.endpoint().url for run in (chain.link(1), two)}  # type: ignore[union-attr]
    with contextlib.suppress(RuntimeError):
        operator.cluster.run("scancel", busy)
    stopped = operator.do("stop", "one")
    queued = [line.split()[0] for line in operator.queue()]
    gone = [(job := chain.link(number).job()) and job.id for number in (1, 2)]
    operator.do("stop", "three")
    ended = [(item["link"], item["how"]) for item in operator.told("history", "one")]
    again = operator.launch(*words, "chain=until:2099-01-01", name="one")

    assert "Slurm job" in waits
    assert "Resources" in waits or "Priority" in waits
    assert listed == {"one": "ready", "two": "ready", "three": "pending"}
    assert len(endpoints) == 2
    assert stopped.stdout == "one stopped\n", stopped.stderr
    assert not set(gone) & set(queued)
    assert ended == [(1, "stopped"), (2, "never began")]
    assert "one/links/3 submitted" in again.stdout, again.stderr


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_what_a_node_cannot_submit_the_launching_command_does(
    tmp_path: Path, tiny_model: Path, operator: Operator
) -> None:
    """Nodes without sbatch: `launch.status` says so, and the command on the login node submits for the same moment."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("srun", "bash", "env", "mkdir"):
        (tools / name).symlink_to(shutil.which(name) or pytest.fail(f"no {name}"))
    words = (*ONE_NODE[:-1], f"model.path=tiny:{tiny_model}", "chain=2", "slurm.time_min=2", "engine.drain_s=5")
    more = ("handover.grace_s=2", "handover.margin_s=90", f'slurm.setup=["export PATH={tools}"]')
    chain = Chain(tmp_path / "runs" / "bare")
    process, output = start(tmp_path, *words, *more, name="bare", env=operator.cluster.env)
    with contextlib.ExitStack() as ended:
        ended.callback(process.wait, 120)
        ended.callback(process.send_signal, signal.SIGINT)
        until(lambda: state(chain.link(1)) is Phase.READY)
        until(lambda: chain.trouble() or chain.link(2).job())
        until(lambda: "submitted from here" in output.read_text())
        until(lambda: chain.trouble() is None and how(chain.link(1)) == "replaced", 90)
        serving = chain.endpoint()
    text = output.read_text()

    assert "link 2 could not be submitted from the job: launcher=slurm needs sbatch on PATH" in text
    assert serving
    assert (serving.link, serving.state) == (2, Phase.READY)
    assert process.returncode == 0, text
    assert "bare has ended" in text
    assert operator.queue() == []
