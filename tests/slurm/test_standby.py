"""A node that dies takes its own members only, whichever it is: another rank leads on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from launch import watch
from launch.records import Endpoint, Phase, RunDirectory
from slurm.children import group_members
from tests.deployments import deployed, processes_of, start
from tests.reference import complete
from tests.slurm_cluster import SlurmCluster

ON_SLURM = ("engine.backend=echo", "cluster=slurm_cpu", "cluster.interface=lo")
NODES = ("+recipe=tiny_2p2d", "engine.backend=echo", "cluster.cpu_engines_per_node=1")


def until(condition: Callable[[], bool], timeout_s: float = 60) -> float:
    """Wait for it, or fail; returns the seconds that it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout_s, "it did not happen in time"
        time.sleep(0.05)
    return time.monotonic() - begun


def endpoint_of(run: RunDirectory) -> Endpoint:
    """What the deployment says of itself now."""
    endpoint = run.endpoint()
    assert endpoint
    return endpoint


def client(run: RunDirectory) -> OpenAI:
    """The official client, pointed at whoever leads."""
    return OpenAI(base_url=endpoint_of(run).url, api_key=run.api_key(), max_retries=0, timeout=30)


def kill_node(run: RunDirectory, rank: int) -> None:
    """SIGKILL the agent of a rank and all that it started, as the loss of its node does."""
    record = run.ranks(1)[rank]
    groups = [member.pid for member in record.members.values()]
    for pid in (record.pid, *(pid for group in groups for pid in group_members(group))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def batch_of(asking: OpenAI, model: str) -> tuple[str, int]:
    """How a batch of one request ends: only one frontend works on batches, that of the head."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = asking.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = asking.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    until(lambda: asking.batches.retrieve(batch.id).status in ("completed", "failed"))
    done = asking.batches.retrieve(batch.id)
    return done.status, done.request_counts.completed if done.request_counts else 0


def standing_by(run: RunDirectory) -> bool:
    """Whether the frontends of ranks 1 and 2 serve as well."""
    ranks = run.ranks(1)
    found = [ranks[rank].members.get(f"frontend-0.{rank}") for rank in (1, 2)]
    return all(member is not None and member.state == "ready" for member in found)


@contextlib.contextmanager
def in_job(
    folder: Path, cluster: SlurmCluster, name: str, *words: str
) -> Iterator[tuple[RunDirectory, subprocess.Popen[str], Path]]:
    """A deployment that serves as a job on the cluster, its launching command, and what that prints; both have ended after."""
    process, output = start(folder, *ON_SLURM, *words, name=name, env=cluster.env)
    run = RunDirectory(folder / "runs" / name)
    try:
        until(lambda: run.endpoint() is not None and endpoint_of(run).state is Phase.READY, 120)
        yield run, process, output
    finally:
        job = run.job()
        if job and job.id:
            with contextlib.suppress(RuntimeError):
                cluster.run("scancel", job.id)
        process.wait(60)


@contextlib.contextmanager
def dead_node(cluster: SlurmCluster, name: str) -> Iterator[None]:
    """A node whose slurmd, stepds and tasks are gone, within the block."""
    cluster.kill_node(name)
    try:
        yield
    finally:
        cluster.start_node(name)


def test_another_rank_leads_when_rank_0_is_gone(tmp_path: Path, tiny_model: Path) -> None:
    """Its agent and all its processes are killed: requests at the new endpoint are answered by the members that are left,
    the lost rank is named, and the stop leaves nothing behind.
    """
    with deployed(tmp_path, *NODES, f"model.path=tiny:{tiny_model}", name="moved") as running:
        run, before = running.run, running.endpoint
        until(lambda: standing_by(run))
        kill_node(run, 0)
        moved_s = until(lambda: endpoint_of(run).head != 0)
        with client(run) as asking:
            answers = [complete(asking, f"after it {i}", bool(i % 2)) for i in range(8)]
            batched = batch_of(asking, running.endpoint.models[0])
        after = endpoint_of(run)
        until(lambda: endpoint_of(run).lost == [0])
        notes = watch.node_notes(run, watch.look(run))
        health = httpx.get(after.url.removesuffix("/v1") + "/health").json()

    print(f"another endpoint after {moved_s:.1f} s")
    assert after.url != before.url
    assert after.state is Phase.DEGRADED
    assert after.term > before.term
    assert {answer.completion_tokens for answer in answers} == {40}
    assert batched == ("completed", 1)
    assert health["status"] == "ready"
    assert notes == [f"lost: rank 0 on {socket.gethostname()}", f"rank {after.head} leads, since rank 0 was lost"]
    assert endpoint_of(run).state is Phase.STOPPED
    assert processes_of(run) == {}


@pytest.mark.slurm
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_job_outlives_its_batch_host(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """slurmd, stepds and tasks of rank 0's node are gone, the batch script and srun with them: requests are served by
    another rank, and `launch.stop` ends the job, which Slurm would keep as a ghost.
    """
    words = ("+recipe=tiny_2p2d", f"model.path=tiny:{tiny_model}")
    stop = [sys.executable, "-m", "launch.stop", "headless", "--runs-dir", str(tmp_path / "runs")]
    with in_job(tmp_path, cluster, "headless", *words) as (run, process, output):
        until(lambda: standing_by(run))
        with dead_node(cluster, "n1"):
            moved_s = until(lambda: endpoint_of(run).head != 0)
            with client(run) as asking:
                at_once = [complete(asking, f"at once {i}", bool(i % 2)) for i in range(8)]
            until(lambda: "DOWN" in cluster.node_state("n1"), 90)
            with client(run) as asking:
                later = [complete(asking, f"later {i}", bool(i % 2)) for i in range(8)]
            jobs = cluster.run("squeue", "--noheader", "--format=%T %N").split()
            ranks = run.ranks(1)
            done = subprocess.run(
                stop, check=False, capture_output=True, text=True, timeout=120, env={**os.environ, **cluster.env}
            )
            until(lambda: cluster.run("squeue", "--noheader") == "", 60)

    print(f"another endpoint after {moved_s:.1f} s")
    assert {answer.completion_tokens for answer in (*at_once, *later)} == {40}
    assert jobs == ["RUNNING", "n[2-4]"], output.read_text()
    assert endpoint_of(run).state is Phase.STOPPED
    assert done.returncode == 0, done.stdout + done.stderr
    assert process.returncode == 0, output.read_text()
    assert all(run.ranks(1)[rank].ended for rank in (1, 2, 3))
    assert not ranks[0].ended
    assert processes_of(run) == {}


@pytest.mark.slurm
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_scancel_ends_all_that_a_dead_batch_host_left(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """Another rank leads; the user does not know of `launch.stop`. Every agent that lives ends in order, and no job is left."""
    words = ("+recipe=tiny_2p2d", f"model.path=tiny:{tiny_model}")
    with in_job(tmp_path, cluster, "cancelled", *words) as (run, process, output):
        until(lambda: standing_by(run))
        with dead_node(cluster, "n1"):
            until(lambda: endpoint_of(run).head != 0)
            with client(run) as asking:
                answers = [complete(asking, f"after it {i}", bool(i % 2)) for i in range(4)]
            job = run.job()
            assert job
            cluster.run("scancel", job.id)
            ended_s = until(lambda: all(run.ranks(1)[rank].ended for rank in (1, 2, 3)))
            until(lambda: cluster.run("squeue", "--noheader") == "", 90)

    print(f"all agents had ended {ended_s:.1f} s after scancel")
    assert {answer.completion_tokens for answer in answers} == {40}
    assert endpoint_of(run).state is Phase.STOPPED
    assert [record.failure for record in run.ranks(1).values() if record.failure] == []
    assert process.returncode is not None, output.read_text()
    assert processes_of(run) == {}


@pytest.mark.nightly
def test_a_head_that_was_held_up_does_not_act(tmp_path: Path, tiny_model: Path) -> None:
    """Its agent is stopped for longer than its lease, another leads, and it goes on: it publishes nothing more, its members
    serve, and the deployment is whole again.
    """
    with deployed(tmp_path, *NODES, f"model.path=tiny:{tiny_model}", name="held") as running:
        run = running.run
        until(lambda: standing_by(run))
        pid = run.ranks(1)[0].pid
        os.kill(pid, signal.SIGSTOP)
        until(lambda: endpoint_of(run).head != 0)
        moved = endpoint_of(run)
        os.kill(pid, signal.SIGCONT)
        until(lambda: not endpoint_of(run).lost and endpoint_of(run).state is Phase.READY)
        seen, until_s = set(), time.monotonic() + 2
        while time.monotonic() < until_s:
            seen.add((endpoint_of(run).head, endpoint_of(run).url))
            time.sleep(0.1)
        with client(run) as asking:
            answers = [complete(asking, f"after it {i}", bool(i % 2)) for i in range(8)]
        log = next(run.logs(1).glob("*_0_log.out")).read_text()

    assert seen == {(moved.head, moved.url)}
    assert "rank 0 no longer leads" in log
    assert {answer.completion_tokens for answer in answers} == {40}
    assert all(record.ended and not record.failure for record in run.ranks(1).values())
    assert processes_of(run) == {}


@pytest.mark.slurm
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_without_a_standby_a_job_ends_with_its_batch_host(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """Two nodes cannot cover each other, as the launch says: the other rank waits a minute, ends, and takes the job along."""
    words = ("+recipe=tiny_disagg", f"model.path=tiny:{tiny_model}")
    with in_job(tmp_path, cluster, "pair", *words) as (run, _, output), dead_node(cluster, "n1"):
        until(lambda: run.ranks(1)[1].ended, 100)
        until(lambda: cluster.run("squeue", "--noheader") == "", 60)

    assert "rank 0's node is not covered" in output.read_text()
    assert "rank 0, the head, was not heard for 60 s" in str(run.ranks(1)[1].failure)
    assert processes_of(run) == {}


@pytest.mark.slurm
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_another_head_stops_before_the_time_limit(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """The time limit is the new head's business: it knows when the job ends, and all have ended before, on their own."""
    words = ("+recipe=tiny_2p2d", f"model.path=tiny:{tiny_model}", "slurm.time_min=2", "engine.drain_s=10")
    with in_job(tmp_path, cluster, "limited-head", *words) as (run, process, output):
        end = endpoint_of(run).expires_at
        with dead_node(cluster, "n1"):
            until(lambda: endpoint_of(run).head != 0)
            after = endpoint_of(run)
            until(lambda: endpoint_of(run).state is Phase.STOPPED, 180)
            until(lambda: all(run.ranks(1)[rank].ended for rank in (1, 2, 3)))
            over = time.time()
            until(lambda: cluster.run("squeue", "--noheader") == "", 60)

    assert end is not None
    assert after.expires_at == pytest.approx(end, abs=2)
    assert end - 60 < over < end
    assert [record.failure for record in run.ranks(1).values() if record.failure] == []
    assert process.returncode == 0, output.read_text()
