"""A live deployment grows by a job that joins it, and shrinks by engines that leave, and no request fails meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from launch import elastic
from launch.logs import choose
from launch.records import Phase, RunDirectory, State
from tests.deployments import deployed, processes_of, start, targets
from tests.reference import complete
from tests.slurm_cluster import SlurmCluster

SHAPE = ("+recipe=tiny_disagg", "engine.backend=echo", "engine.echo_interval_s=0.02")
ON_SLURM = (*SHAPE, "cluster=slurm_cpu", "cluster.interface=lo", "slurm.time_min=10")


def until(condition: Callable[[], bool], timeout_s: float = 90) -> None:
    """Wait for it, or fail."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def scale(
    run: RunDirectory, *words: str, env: Mapping[str, str] | None = None, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    """`python -m launch.scale` on a deployment."""
    argv = [sys.executable, "-m", "launch.scale", run.name, *words, "--runs-dir", str(run.path.parent)]
    environ = {**os.environ, **(env or {})}
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=timeout_s, env=environ)


def status(run: RunDirectory, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`python -m launch.status --json` of a deployment."""
    argv = [sys.executable, "-m", "launch.status", run.name, "--json", "--runs-dir", str(run.path.parent)]
    environ = {**os.environ, **(env or {})}
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60, env=environ)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def members(run: RunDirectory) -> dict[str, State]:
    """What agents say of every member that ever was."""
    job = run.job()
    assert job
    return {name: each.state for rank in run.ranks(job.attempt).values() for name, each in rank.members.items()}


def job_of(run: RunDirectory) -> str:
    """Slurm's number of the deployment's own job."""
    job = run.job()
    assert job
    return job.id


def phase(run: RunDirectory) -> Phase | None:
    """What the endpoint says."""
    endpoint = run.endpoint()
    return endpoint.state if endpoint else None


def complete_with(run: RunDirectory, text: str) -> int:
    """Tokens of the answer to one request."""
    endpoint = run.endpoint()
    assert endpoint
    with OpenAI(base_url=endpoint.url, api_key=run.api_key(), max_retries=0, timeout=60) as client:
        return complete(client, text, False).completion_tokens


class Load:
    """Requests without a pause; `answered` ones are whole, of all others there is a word in `failed`."""

    def __init__(self) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self.over = threading.Event()

    def ask(self, client: OpenAI) -> None:
        """One client; its answers of 40 tokens take 0.8 s, so that every change meets some half way."""
        while not self.over.is_set():
            try:
                answer = complete(client, f"request {self.answered}", self.answered % 2 == 0)
                assert answer.completion_tokens == 40
                self.answered += 1
            except Exception as error:  # noqa: BLE001  # whatever a client sees counts
                self.failed.append(repr(error))


@contextlib.contextmanager
def under_load(run: RunDirectory, clients: int = 6) -> Iterator[Load]:
    """Constant load on the deployment within the block."""
    endpoint, load = run.endpoint(), Load()
    assert endpoint
    with OpenAI(base_url=endpoint.url, api_key=run.api_key(), max_retries=0, timeout=60) as client:
        threads = [threading.Thread(target=load.ask, args=(client,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield load
        finally:
            load.over.set()
            for thread in threads:
                thread.join()


@contextlib.contextmanager
def on_slurm(
    folder: Path, cluster: SlurmCluster, name: str, *words: str, ready: bool = True
) -> Iterator[tuple[RunDirectory, subprocess.Popen[str]]]:
    """A deployment on the cluster; nothing is left in the queue, whatever the test did."""
    process, output = start(folder, *words, name=name, env=cluster.env)
    run = RunDirectory(folder / "runs" / name)
    try:
        if ready:
            until(lambda: phase(run) is Phase.READY or process.poll() is not None)
            assert process.poll() is None, output.read_text()
        yield run, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        if process.poll() is None:
            process.kill()
        for job in cluster.run("squeue", "--noheader", "--format=%A").split():
            with contextlib.suppress(RuntimeError):
                cluster.run("scancel", job)
        until(lambda: cluster.run("squeue", "--noheader") == "", 60)


def test_agents_join_and_leave_on_one_machine(tmp_path: Path, tiny_model: Path) -> None:
    """Two engines join and the first ones leave while clients ask without a pause, also when only the file says so; operators'
    commands, metrics and status know who is there, and a stop of the deployment ends them all."""
    with deployed(tmp_path, *SHAPE, f"model.path=tiny:{tiny_model}", name="grown") as running:
        run = running.run
        with under_load(run) as load:
            more = scale(run, "decode=+1", "prefill=+1")
            grown = status(run)
            agents = [path.read_text() for name, path in sorted(choose(run, None).items()) if name.startswith("rank-")]
            until(lambda: running.metric("decode-1", "baton_worker_streams") > 0)
            fewer = scale(run, "decode-0")
            last = scale(run, "decode=-1")
            elastic.leave(run, 1, "prefill-0", "a file, and nobody told the frontends")
            until(lambda: members(run)["prefill-0"] is State.STOPPED)
            answered = load.answered
            until(lambda: load.answered > answered + 10)
        left = status(run)
        paged = {item["labels"]["member"] for item in targets(run)}

    assert load.failed == []
    assert more.returncode == 0, more.stderr
    assert grown["members"]["decode-1"]["state"] == "ready"
    assert grown["members"]["decode-1"]["rank"] == 1
    assert ["decode-1 is ready" in text for text in agents] == [False, True]
    assert "extension 1 (job " in grown["changes"][0]
    assert fewer.returncode == 0, fewer.stderr
    assert "decode-0 has left" in fewer.stdout
    assert last.returncode == 1
    assert "no decode engine would be left of decode-1" in last.stderr
    assert left["state"] == "ready"
    assert "decode-0" not in left["members"]
    assert "prefill-0 left: a file, and nobody told the frontends" in left["changes"]
    assert paged == {"prefill-1", "decode-1", "frontend-0"}
    assert processes_of(run) == {}


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_real_engine_that_joined_pulls_what_an_older_one_computed(tmp_path: Path, tiny_model: Path) -> None:
    """vLLM with NIXL: once the first decode engine has left, the one that joined answers alone, and answers the same."""
    texts = [f"The {word} of the year is" for word in ("first month", "last day", "longest night", "end")]
    with deployed(tmp_path, "+recipe=tiny_disagg", f"model.path=tiny:{tiny_model}", name="vllm") as running:
        before = [complete(running.client, text, False) for text in texts]
        more = scale(running.run, "decode=+1", timeout_s=200)
        fewer = scale(running.run, "decode-0")
        after = [complete(running.client, text, True) for text in texts]
        pulled = running.metric("decode-1", "baton_worker_nixl_transferred_bytes_total")
        failed = running.metric("decode-1", "baton_worker_nixl_failed_transfers_total")

    assert more.returncode == 0, more.stderr
    assert fewer.returncode == 0, fewer.stderr
    assert after == before
    assert pulled > 0
    assert failed == 0


@pytest.mark.slurm
def test_a_job_joins_and_its_nodes_are_free_when_its_engines_have_left(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """Under constant load; what sbatch refuses is told, and is as if it had never been asked for."""
    with on_slurm(tmp_path, cluster, "wide", *ON_SLURM, f"model.path=tiny:{tiny_model}") as (run, _):
        refused = scale(run, "decode=+1", env={**cluster.env, "SBATCH_PARTITION": "nowhere"})
        with under_load(run) as load:
            more = scale(run, "decode=+2", env=cluster.env)
            jobs = cluster.run("squeue", "--noheader", "--format=%A %D").split("\n")
            ranks = {rank: record.host for rank, record in run.ranks(1).items()}
            reports = [json.loads(run.preflight_of(rank) or b"{}") for rank in (2, 3)]
            fewer = scale(run, "decode=-1", env=cluster.env)
            still = cluster.run("squeue", "--noheader", "--format=%A").split()
            rest = scale(run, "decode-1", env=cluster.env)
            until(lambda: len(cluster.run("squeue", "--noheader", "--format=%A").split()) == 1)
            answered = load.answered
            until(lambda: load.answered > answered + 10)
        ready = phase(run)

    assert load.failed == []
    assert refused.returncode == 1
    assert "sbatch refused the job" in refused.stderr
    assert "invalid partition" in refused.stderr
    assert more.returncode == 0, more.stderr
    assert "decode-1, decode-2 serve" in more.stdout  # the names that were refused before
    assert sorted(ranks) == [0, 1, 2, 3]
    assert sum(line.endswith(" 2") for line in jobs) == 2
    assert [{link["peer"]: link["error"] for link in report["links"]} for report in reports] == [{0: None}, {0: None}]
    assert "decode-2 has left" in fewer.stdout
    assert len(still) == 2
    assert rest.returncode == 0, rest.stderr
    assert ready is Phase.READY


@pytest.mark.slurm
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_lost_node_is_replaced_by_a_job_that_joins(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """Its slurmd, stepds and tasks are gone: an engine with a new name serves on another node, the deployment is ready again,
    and says what happened."""
    words = (*ON_SLURM, f"model.path=tiny:{tiny_model}", "roles.decode.replicas=2", "slurm.on_lost_node=extra_job")
    with on_slurm(tmp_path, cluster, "mended", *words) as (run, _):
        with under_load(run, clients=2) as load:
            cluster.kill_node("n3")
            try:
                until(lambda: phase(run) is Phase.DEGRADED, 60)
                until(lambda: phase(run) is Phase.READY, 150)
            finally:
                cluster.start_node("n3")
        said = status(run, cluster.env)

    assert load.failed == []
    assert said["members"]["decode-2"]["state"] == "ready"
    assert "decode-1" not in said["members"]
    assert any("decode-2 in place of decode-1" in change for change in said["changes"])
    assert any(change.startswith("decode-1 was lost: rank 2 on") for change in said["changes"])


@pytest.mark.slurm
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_replacement_that_is_cancelled_in_the_queue_is_asked_for_again(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """All other nodes are drained, so that it waits; once they are there again the deployment is ready as before."""
    words = (*ON_SLURM, f"model.path=tiny:{tiny_model}", "roles.decode.replicas=2", "slurm.on_lost_node=extra_job")
    pending = ("squeue", "--noheader", "--states=PENDING", "--format=%A")
    with on_slurm(tmp_path, cluster, "again", *words) as (run, _):
        cluster.run("scontrol", "update", "NodeName=n4", "State=DRAIN", "Reason=test")
        cluster.kill_node("n3")
        try:
            until(lambda: cluster.run(*pending).split() != [], 90)
            (first,) = cluster.run(*pending).split()
            cluster.run("scancel", first)
            until(lambda: cluster.run(*pending).split() not in ([], [first]), 120)
            told = status(run, cluster.env)["changes"]
            cluster.run("scontrol", "update", "NodeName=n4", "State=RESUME")
            until(lambda: phase(run) is Phase.READY, 90)
        finally:
            cluster.start_node("n3")
            with contextlib.suppress(RuntimeError):  # it is there again already, if all went well
                cluster.run("scontrol", "update", "NodeName=n4", "State=RESUME")
        ready = status(run, cluster.env)["members"]

    assert f"decode-2 left: job {first} ended before it joined (CANCELLED)" in told
    assert ready["decode-3"]["state"] == "ready"


@pytest.mark.slurm
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_stop_is_over_only_when_the_jobs_that_joined_are(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """One whose agent is held up outlives the deployment's own job, and `launch.stop` waits for it."""
    words = (*ON_SLURM, f"model.path=tiny:{tiny_model}", "engine.drain_s=40")
    stop = [sys.executable, "-m", "launch.stop", "late", "--runs-dir", str(tmp_path / "runs")]
    with on_slurm(tmp_path, cluster, "late", *words) as (run, _):
        joined = scale(run, "decode=+1", env=cluster.env)
        agent = run.ranks(1)[2].pid
        os.kill(agent, signal.SIGSTOP)
        stopping = subprocess.Popen(stop, stdout=subprocess.PIPE, text=True, env={**os.environ, **cluster.env})
        try:
            until(lambda: job_of(run) not in cluster.run("squeue", "--noheader", "--format=%A").split())
            time.sleep(5)  # a squeue may be cached for 3 s
            left, waits = cluster.run("squeue", "--noheader", "--format=%T").split(), stopping.poll() is None
        finally:
            os.kill(agent, signal.SIGCONT)
            said, _ = stopping.communicate(timeout=120)
        after = cluster.run("squeue", "--noheader")

    assert joined.returncode == 0, joined.stderr
    assert (left, waits) == (["RUNNING"], True)
    assert said == "late stopped\n"
    assert after == ""


@pytest.mark.slurm
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_job_that_joined_leaves_before_its_own_time_limit(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """Under load: its engines drain on its own notice, its job ends, and the deployment lives on; so it does when the job is
    cancelled, and while another still waits in the queue."""
    words = (*ON_SLURM, f"model.path=tiny:{tiny_model}", "engine.drain_s=5")
    with on_slurm(tmp_path, cluster, "lent", *words) as (run, _):
        with under_load(run) as load:
            lent = scale(run, "decode=+1", "--time-min", "2", env=cluster.env)
            until(lambda: "decode-1 left" in " ".join(status(run, cluster.env)["changes"]), 150)
            until(lambda: len(cluster.run("squeue", "--noheader", "--format=%A").split()) == 1)
            after_limit = phase(run)
            cancelled = scale(run, "decode=+1", env=cluster.env)
            job = next(iter(set(cluster.run("squeue", "--noheader", "--format=%A").split()) - {job_of(run)}))
            cluster.run("scancel", job)
            until(lambda: len(cluster.run("squeue", "--noheader", "--format=%A").split()) == 1)
            until(lambda: phase(run) is Phase.READY)
        cluster.run("scontrol", "update", f"NodeName={','.join(cluster.nodes)}", "State=DRAIN", "Reason=test")
        waiting = scale(run, "decode=+1", "--no-wait", env=cluster.env)
        told = status(run, cluster.env)["changes"]
        queued = cluster.run("squeue", "--noheader", "--states=PENDING", "--format=%D").split()
        waiting_phase = phase(run)
        stop = [sys.executable, "-m", "launch.stop", "lent", "--runs-dir", str(run.path.parent)]
        stopped = subprocess.run(stop, check=False, capture_output=True, text=True, env={**os.environ, **cluster.env})
        cluster.run("scontrol", "update", f"NodeName={','.join(cluster.nodes)}", "State=RESUME")
        until(lambda: cluster.run("squeue", "--noheader") == "", 60)

    assert load.failed == []
    assert lent.returncode == 0, lent.stderr
    assert after_limit is Phase.READY
    assert cancelled.returncode == 0, cancelled.stderr
    assert any("decode-2 left: job" in change for change in told)
    assert waiting.returncode == 0, waiting.stderr
    assert queued == ["1"]
    assert waiting_phase is Phase.READY
    assert stopped.stdout == "lent stopped\n"
