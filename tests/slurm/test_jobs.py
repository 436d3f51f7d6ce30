"""On a real Slurm without accounting: what its options do to a deployment, and what its signals mean."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from openai import APIConnectionError, APIStatusError, OpenAI

from launch.records import Phase, RunDirectory
from tests.deployments import command, processes_of, start
from tests.reference import complete
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

SHAPE = ("+recipe=tiny_2p2d", "engine.backend=echo", "cluster=slurm_cpu", "cluster.interface=lo")


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


def client(run: RunDirectory) -> OpenAI:
    """The official client, pointed at the deployment."""
    endpoint = run.endpoint()
    assert endpoint
    return OpenAI(base_url=endpoint.url, api_key=run.api_key(), max_retries=0, timeout=60)


class Load:
    """Clients that ask without pause, until one is told that the deployment is stopping, or `end`."""

    def __init__(self, run: RunDirectory, clients: int = 8) -> None:
        self.answered: list[float] = []
        """When each answer that came whole was asked for."""
        self.refused: list[float] = []
        """When what was refused was asked for."""
        self.failed: list[str] = []
        """What clients saw beside these two."""
        self._run = run
        self._ending = False
        self._threads = [threading.Thread(target=self._ask, args=(i / 4,)) for i in range(clients)]

    def start(self) -> None:
        """Begin, one client after the other: answers of one length that begin together would end together."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Ask no more."""
        self._ending = True

    def join(self) -> None:
        """Wait until all have their last answers."""
        for thread in self._threads:
            thread.join()

    def _ask(self, after_s: float) -> None:
        time.sleep(after_s)
        with client(self._run) as asking:
            while not (self.refused or self._ending):
                begun = time.time()
                try:
                    answer = complete(asking, "until the very end", True)
                    assert answer.completion_tokens == 40
                    self.answered.append(begun)
                except APIStatusError as error:
                    if error.status_code == 503 and "the deployment is stopping" in error.message:
                        self.refused.append(begun)
                    else:
                        self.failed.append(str(error))
                except APIConnectionError as error:
                    # Nobody listens any more: it was never admitted. One that breaks was.
                    closed = "Connection refused" in repr(error.__cause__)
                    (self.refused.append(begun) if closed else self.failed.append(repr(error.__cause__)))
                except Exception as error:  # noqa: BLE001  # whatever a client sees counts
                    self.failed.append(repr(error))


@contextlib.contextmanager
def ended_after(run: RunDirectory, cluster: SlurmCluster) -> Iterator[None]:
    """Cancel what is left of the deployment's job, whatever the test did."""
    try:
        yield
    finally:
        job = run.job()
        if job and job.id:
            with contextlib.suppress(RuntimeError):
                cluster.run("scancel", job.id)
        until(lambda: cluster.run("squeue", "--noheader") == "", 60)


def test_a_printed_script_submitted_by_hand_serves_once(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """dry_run touches nothing, so the script prepares the run directory itself; submitted again it says why it will not.

    On the way: the endpoint knows when the job ends though this Slurm does not say so in the environment, and a task that
    is killed takes nobody along.
    """
    words = (*SHAPE, f"model.path=tiny:{tiny_model}", "slurm.time_min=7")
    run = RunDirectory(tmp_path / "runs" / "by-hand")
    shown = subprocess.run(
        [*command(tmp_path, *words, name="by-hand"), "dry_run=true"], check=True, capture_output=True, text=True
    ).stdout
    assert not run.path.exists()
    script = tmp_path / "job.sh"
    script.write_text(shown.partition("# batch script\n")[2].partition("\n# frontend-0")[0])
    with ended_after(run, cluster):
        job = cluster.run("sbatch", "--parsable", str(script)).strip()
        until(lambda: run.path.exists() and state(run) is Phase.READY)
        endpoint = run.endpoint()
        assert endpoint
        left = float(str(endpoint.expires_at)) - time.time()
        health = httpx.get(endpoint.url.removesuffix("/v1") + "/health").json()
        ranks = run.ranks(1)
        os.kill(ranks[3].pid, signal.SIGKILL)
        time.sleep(8)  # longer than Slurm took to end such a job by its own defaults
        with client(run) as asking:
            answers = [complete(asking, f"after it {i}", False) for i in range(8)]
        again = cluster.run("sbatch", "--parsable", str(script)).strip()
        log = run.logs(1) / f"{again}_0_log.out"
        until(lambda: log.exists() and "error:" in log.read_text())

        assert run.job() is not None
        assert json.loads((run.path / "job.json").read_text())["id"] == job
        assert 300 < left <= 420
        assert health["status"] == "ready"
        assert abs(health["seconds_left"] - left) < 20
        assert {answer.completion_tokens for answer in answers} == {40}
        assert cluster.run("squeue", "--noheader", "--jobs", job, "--format=%T").strip() == "RUNNING"
        assert f"this batch script served job {job} already, and this is job {again}" in log.read_text()


def test_inside_an_allocation_the_agents_are_one_step_of_it(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """salloc, then `launcher=allocation`: it serves, `launch.stop` ends it, and the allocation is still there."""
    words = (*SHAPE, f"model.path=tiny:{tiny_model}", "launcher=allocation", "wait=ready")
    launch = command(tmp_path, *words, name="inside")
    stop = [sys.executable, "-m", "launch.stop", "inside", "--runs-dir", str(tmp_path / "runs")]
    inside = (
        f"{' '.join(launch)} && squeue --noheader --steps --format='steps %i' && {' '.join(stop)} && "
        "squeue --noheader --jobs $SLURM_JOB_ID --format='job %T'"
    )
    done = subprocess.run(
        ["salloc", "--nodes=4", "--ntasks-per-node=1", "--time=5", "bash", "-c", inside],
        check=False, capture_output=True, text=True, timeout=120, env={**os.environ, **cluster.env},
    )  # fmt: skip
    run = RunDirectory(tmp_path / "runs" / "inside")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "API key" in done.stdout
    assert re.search(r"steps \d+\.0\n", done.stdout)
    assert "inside stopped" in done.stdout
    assert "job RUNNING" in done.stdout
    assert all(record.ended and not record.failure for record in run.ranks(1).values())
    assert processes_of(run) == {}


def test_an_allocation_that_is_too_small_is_refused_with_the_size(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """And outside of one the message says how to get it."""
    words = (*SHAPE, f"model.path=tiny:{tiny_model}", "launcher=allocation")
    env = {**os.environ, **cluster.env}
    argv = command(tmp_path, *words, name="small")
    small = subprocess.run(
        ["salloc", "--nodes=2", "--time=5", *argv], check=False, capture_output=True, text=True, timeout=60, env=env
    )
    outside = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60, env=env)

    assert re.search(r"needs 4 nodes and job \d+ has 2: `salloc --nodes=4", small.stderr)
    assert "launcher=allocation runs inside a job and this is none" in outside.stderr


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_no_request_fails_when_the_time_limit_comes(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """A job of two minutes under constant load: every admitted request is answered whole, the rest is refused with 503 and
    told when to come back, and all ranks end well before Slurm would end them."""
    words = (
        *SHAPE,
        f"model.path=tiny:{tiny_model}",
        "slurm.time_min=2",
        "engine.drain_s=10",
        "engine.echo_interval_s=0.05",
    )
    process, output = start(tmp_path, *words, name="limited", env=cluster.env)
    run = RunDirectory(tmp_path / "runs" / "limited")
    load = Load(run)

    with ended_after(run, cluster):
        until(lambda: state(run) is Phase.READY)
        endpoint = run.endpoint()
        assert endpoint
        end = float(str(endpoint.expires_at))
        load.start()
        load.join()
        until(lambda: cluster.run("squeue", "--noheader") == "", 60)
        over = time.time()
        process.wait(30)

    assert load.failed == []
    assert len(load.answered) > 100
    # 10 s to drain and 30 s to leave, as `notice_s` has it; the load notices within an answer's time.
    assert -3 < min(load.refused) - (end - 40) < 6
    assert over < end
    assert all(record.ended and not record.failure for record in run.ranks(1).values())
    assert process.returncode == 0, output.read_text()


# Prompts are computed slowly and one after the other, so that most requests still need a decode worker.
SLOW_ECHO = ("engine.echo_interval_s=0.02", "engine.echo_cache_blocks=1000", "engine.echo_prefill_tokens_per_s=100")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((*SHAPE, *SLOW_ECHO), id="echo"),
        pytest.param(
            ("+recipe=tiny_disagg", *SHAPE[2:]),
            id="vllm",
            marks=[pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(400)],
        ),
    ],
)
def test_no_request_fails_when_the_job_is_cancelled(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster, words: tuple[str, ...]
) -> None:
    """`scancel` under constant load, prefill and decode apart: Slurm's SIGTERM reaches every process of the job, twice, and
    yet workers serve until the frontends have finished. Then all leave before KillWait (10 s here), each rank in order."""
    process, output = start(tmp_path, *words, f"model.path=tiny:{tiny_model}", name="cancelled", env=cluster.env)
    run = RunDirectory(tmp_path / "runs" / "cancelled")
    load = Load(run, clients=6)
    with ended_after(run, cluster):
        until(lambda: state(run) is Phase.READY, 200)
        load.start()
        until(lambda: len(load.answered) > 12)
        job = run.job()
        assert job
        asked = time.time()
        cluster.run("scancel", job.id)
        until(lambda: state(run) is not Phase.READY)
        load.end()
        load.join()
        process.wait(60)
        left = processes_of(run)
    ranks = run.ranks(1)

    assert load.failed == []
    assert any(begun > asked - 5 for begun in load.answered)
    assert min(load.refused, default=asked) > asked - 0.1
    assert process.returncode == 0, output.read_text()
    assert all(record.ended and not record.failure for record in ranks.values())
    assert left == {}


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("rank", [pytest.param(2, id="of-the-control-plane"), pytest.param(3, id="of-engines-only")])
def test_a_dead_node_takes_only_its_own_members(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster, rank: int
) -> None:
    """slurmd, its stepds and all tasks of a node are gone: the job lives, the other members serve on, and the lost rank is
    named.
    """
    node = f"n{rank + 1}"
    process, output = start(tmp_path, *SHAPE, f"model.path=tiny:{tiny_model}", name="bereft", env=cluster.env)
    run = RunDirectory(tmp_path / "runs" / "bereft")
    with ended_after(run, cluster):
        until(lambda: state(run) is Phase.READY)
        cluster.kill_node(node)
        try:
            until(lambda: "DOWN" in cluster.node_state(node), 90)
            with client(run) as asking:
                answers = [complete(asking, f"after it {i}", bool(i % 2)) for i in range(20)]
            jobs = cluster.run("squeue", "--noheader", "--format=%T %N").split()
            endpoint = run.endpoint()
        finally:
            cluster.start_node(node)
        process.send_signal(signal.SIGINT)
        process.wait(120)

    assert {answer.completion_tokens for answer in answers} == {40}
    assert jobs == ["RUNNING", "n[1-2,4]" if rank == 2 else "n[1-3]"], output.read_text()
    assert endpoint
    assert (endpoint.state, endpoint.head, endpoint.lost) == (Phase.DEGRADED, 0, [rank])


def test_a_signal_before_the_agent_listens_is_kept() -> None:
    """Python would die of it; importing the agent takes long enough for a `scancel` to fall into."""
    code = (
        "from slurm import signals; import os, signal; signals.hold();"
        "[os.kill(os.getpid(), each) for each in signals.HELD]; print([int(each) for each in signals.came()], signals.came())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert (
        done.stdout == f"{[int(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGURG, signal.SIGUSR2)]} ()\n"
    )


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_decode_nodes_pull_a_block_by_nixl_before_engines_start(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """Every byte of 64 MiB, between the tasks of two nodes; the rate is in the verdict."""
    words = ("+recipe=tiny_disagg", "engine.backend=echo", "cluster=slurm_cpu", "cluster.interface=lo")
    more = (f"model.path=tiny:{tiny_model}", "preflight.kv=always", "preflight.only=true", "preflight.timeout_s=90")
    done = subprocess.run(
        command(tmp_path, *words, *more, name="pulled"),
        check=False, capture_output=True, text=True, timeout=300, env={**os.environ, **cluster.env},
    )  # fmt: skip
    reports = json.loads((tmp_path / "runs" / "pulled" / "preflight.json").read_text())
    (link,) = reports[1]["links"]

    assert done.returncode == 0, done.stdout + done.stderr
    assert link["nixl_error"] is None
    assert link["nixl_gbit_per_s"] > 0
    assert "rank 1 on" in done.stdout
