"""From launch to end: what is shown, what survives, and that nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from launch.plan import PORT_BLOCK
from launch.records import Phase, RunDirectory
from tests.deployments import Deployment, command, deployed, processes_of, start
from tests.reference import complete
from tests.slurm_cluster import SlurmCluster

ECHO = ("+recipe=tiny_2p2d", "engine.backend=echo")


def operator(folder: Path, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An operator's command, from a shell that has nothing of the launch but its run directory."""
    argv = [sys.executable, "-m", f"launch.{tool}", *arguments, "--runs-dir", str(folder / "runs")]
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)


def until(condition: Callable[[], bool], timeout_s: float = 15) -> float:
    """Wait for the condition; returns the seconds it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout_s, "it did not come to pass"
        time.sleep(0.05)
    return time.monotonic() - begun


def temporary_files() -> set[str]:
    """What is in the temp folder and in shared memory under names of ours or of the engines."""
    marks = ("baton-", "vllm", "psm_", "torch", "ucx")
    return {
        str(path)
        for folder in (tempfile.gettempdir(), "/dev/shm")
        for path in Path(folder).iterdir()
        if path.name.startswith(marks)
    }


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, tiny_model: Path) -> None:
    """No process, socket, temp file or shared memory of the engines, the servers or the agents; exit code 0."""
    before = temporary_files()
    with deployed(tmp_path, "+recipe=tiny_disagg", f"model.path=tiny:{tiny_model}", name="brief") as running:
        complete(running.client, "warm up", True)
        assert temporary_files() > before  # else the last line below would prove nothing
        ports = [int(record.port_base) for record in running.run.ranks(1).values()]

    assert running.launcher.returncode == 0
    assert "brief stopped" in running.output
    assert processes_of(running.run) == {}
    assert temporary_files() - before == set()
    listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True, check=True).stdout
    taken = {
        int(line.split()[1].rpartition(":")[2], 16) for line in listening.splitlines()[1:] if line.split()[3] == "0A"
    }
    assert not taken & {port + offset for port in ports for offset in range(PORT_BLOCK)}
    endpoint = running.run.endpoint()
    assert endpoint
    assert endpoint.state is Phase.STOPPED


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_a_killed_agent_leaves_no_engine_behind(tmp_path: Path, tiny_model: Path) -> None:
    """SIGKILL of the agent and of the member at once, which neither can answer: the engine core goes too."""
    with deployed(tmp_path, "+recipe=tiny_agg", f"model.path=tiny:{tiny_model}", name="killed") as running:
        agent = running.run.ranks(1)[0].pid
        member = running.pids()["aggregated-0"]
        os.kill(agent, signal.SIGKILL)
        os.kill(member, signal.SIGKILL)
        until(lambda: not [line for line in processes_of(running.run).values() if "launch" not in line], 20)
        running.launcher.wait(60)

    assert running.launcher.returncode == 1
    assert "ended before its time" in running.output


@pytest.mark.slurm
def test_a_dry_run_prints_what_is_then_submitted(tmp_path: Path, cluster: SlurmCluster) -> None:
    """The batch script to the letter, and it touches nothing: not even the model is made."""
    shape = (
        *ECHO,
        "cluster=slurm_cpu",
        "cluster.interface=lo",
        "slurm.partition=main",
        f"model.path=tiny:{tmp_path / 'new'}",
    )
    env = {**os.environ, **cluster.env}
    argv = command(tmp_path, *shape, name="shown")
    dry = subprocess.run([*argv, "dry_run=true"], capture_output=True, text=True, check=True, env=env)
    assert list(tmp_path.iterdir()) == []
    subprocess.run([*argv, "wait=false"], capture_output=True, text=True, check=True, env=env)
    submitted = next((tmp_path / "runs" / "shown" / "logs" / "attempt_1").glob("*_submission.sh"))
    stop = [sys.executable, "-m", "launch.stop", "shown", "--runs-dir", str(tmp_path / "runs")]
    subprocess.run(stop, capture_output=True, text=True, check=True, env=env, timeout=120)

    assert submitted.read_text().strip() in dry.stdout
    for said in (
        "prefill-1 on rank 1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT=<rank 3 port 21>",
        "python -m launch +recipe=tiny_2p2d",
    ):
        assert said in dry.stdout


def test_the_curl_that_is_printed_works_when_pasted(tmp_path: Path, tiny_model: Path) -> None:
    """In a shell, as it stands."""
    with deployed(tmp_path, *ECHO, f"model.path=tiny:{tiny_model}", name="pasted") as running:
        until(lambda: "try " in running.output)
        line = next(line for line in running.output.splitlines() if line.startswith("try"))
        answer = subprocess.run(line.removeprefix("try"), shell=True, capture_output=True, text=True, check=True)

    assert json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_progress_of_every_member_is_shown(tmp_path: Path, tiny_model: Path) -> None:
    """From queued to ready, then to stopped."""
    with deployed(tmp_path, *ECHO, f"model.path=tiny:{tiny_model}", name="shown") as running:
        until(lambda: "Ctrl-C stops" in running.output)
    lines = running.output.splitlines()

    for name in ("prefill-0", "prefill-1", "decode-0", "decode-1", "frontend-0", "nats", "etcd"):
        said = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
        assert said[0] == "queued"
        assert "ready" in said
        assert said[-1] == "stopped"


def test_two_deployments_of_one_machine_do_not_meet(tmp_path: Path, tiny_model: Path) -> None:
    """Same recipe, same moment: other ports, other keys, other workers."""
    with (
        deployed(tmp_path / "a", *ECHO, f"model.path=tiny:{tiny_model}", name="twin") as first,
        deployed(tmp_path / "b", *ECHO, f"model.path=tiny:{tiny_model}", name="twin") as second,
    ):
        blocks = [record.port_base for run in (first.run, second.run) for record in run.ranks(1).values()]
        wrong = httpx.get(f"{second.endpoint.url}/models", headers={"Authorization": f"Bearer {first.run.api_key()}"})
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda item: complete(item.client, "to each its own", False), (first, second)))
        legs = [item.metric("frontend-0", "baton_frontend_legs_total") for item in (first, second)]

    assert len(set(blocks)) == 4
    assert wrong.status_code == 401
    assert both[0] == both[1]
    assert legs == [2, 2]


def test_operators_see_and_end_what_another_shell_launched(tmp_path: Path, tiny_model: Path) -> None:
    """status, logs and stop, after the launching command is gone."""
    argv = command(tmp_path, *ECHO, f"model.path=tiny:{tiny_model}", "wait=false", name="left")
    launched = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    assert launched.returncode == 0, launched.stderr
    until(lambda: operator(tmp_path, "status", "left").returncode == 0, 30)
    status = operator(tmp_path, "status", "left")
    state = json.loads(operator(tmp_path, "status", "left", "--json").stdout)
    logs = operator(tmp_path, "logs", "left", "decode-0")
    missing = operator(tmp_path, "logs", "left", "decode-9")
    again = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    stopped = operator(tmp_path, "stop", "left")

    assert "left is ready" in status.stdout
    assert state["state"] == "ready"
    assert {name for name in state["members"]} >= {"prefill-0", "decode-1", "frontend-0", "nats", "etcd"}
    assert "serves tiny at tcp://" in logs.stdout
    assert missing.returncode == 1
    assert "did you mean 'decode-" in missing.stderr
    assert again.returncode == 1
    assert "a deployment named 'left' is running" in again.stderr
    assert "launch.stop left" in again.stderr
    assert stopped.stdout == "left stopped\n"
    assert "left is stopped" in operator(tmp_path, "status", "left").stdout
    assert operator(tmp_path, "stop", "left").stdout == "left is not running\n"
    assert operator(tmp_path, "status", "lefd").returncode == 1


@pytest.mark.parametrize("after_s", [0.3, 0.8, 1.5, 2.5])
def test_ctrl_c_at_any_moment_of_the_start_ends_it(tmp_path: Path, tiny_model: Path, after_s: float) -> None:
    """Before the control plane is there, while it starts, while members load."""
    process, output = start(tmp_path, *ECHO, f"model.path=tiny:{tiny_model}", name="early")
    until(lambda: "submitted" in output.read_text())
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    process.wait(60)

    assert "early stopped" in output.read_text()
    assert processes_of(RunDirectory(tmp_path / "runs" / "early")) == {}


def test_a_closed_terminal_leaves_the_deployment_running(tmp_path: Path, tiny_model: Path) -> None:
    """SIGHUP, as when an ssh connection breaks; `launch.stop` still ends it."""
    with deployed(tmp_path, *ECHO, f"model.path=tiny:{tiny_model}", name="hung-up") as running:
        os.killpg(running.launcher.pid, signal.SIGHUP)
        running.launcher.wait(10)
        time.sleep(1)
        answer = complete(running.client, "still there", False)
        stopped = operator(tmp_path, "stop", "hung-up")

        assert answer.completion_tokens == 40
        assert stopped.stdout == "hung-up stopped\n"
        assert processes_of(running.run) == {}


def test_a_run_directory_that_was_left_behind_is_taken_over(tmp_path: Path, tiny_model: Path) -> None:
    """Everything was killed with SIGKILL: the name is free again, and what the records say is not taken for the present."""
    words = ("+recipe=tiny_agg", "engine.backend=echo", f"model.path=tiny:{tiny_model}")
    with deployed(tmp_path, *words, name="stale") as running:
        run = running.run
        running.launcher.kill()
        for pid in processes_of(run):
            with contextlib.suppress(ProcessLookupError):  # its agent's death was enough
                os.kill(pid, signal.SIGKILL)
        until(lambda: not processes_of(run))
        left = run.endpoint()
        process, _ = start(tmp_path, *words, name="stale")
        until(lambda: attempt(run) == 2 and phase_of(run) is Phase.READY, 60)
        answer = complete(OpenAI(base_url=url_of(run), api_key=run.api_key()), "after it", False)
        process.send_signal(signal.SIGINT)

        assert process.wait(60) == 0
    assert left
    assert left.state is Phase.READY  # as if it still served
    assert answer.completion_tokens == 40


def attempt(run: RunDirectory) -> int:
    """The number of the newest attempt."""
    job = run.job()
    return job.attempt if job else 0


def phase_of(run: RunDirectory) -> Phase | None:
    """What the endpoint says of itself."""
    endpoint = run.endpoint()
    return endpoint.state if endpoint else None


def url_of(run: RunDirectory) -> str:
    """Where requests go."""
    endpoint = run.endpoint()
    assert endpoint
    return endpoint.url


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """A deployment whose children are killed, each once."""
    with deployed(tmp_path_factory.mktemp("mended"), *ECHO, f"model.path=tiny:{tiny_model}", name="mended") as running:
        yield running


@pytest.mark.parametrize("victim", ["nats", "etcd", "decode-0", "frontend-0"])
def test_a_killed_child_comes_back_by_itself(mended: Deployment, victim: str) -> None:
    """Under another pid, and requests are served as long as another worker is left."""
    before = mended.pids()[victim]
    os.kill(before, signal.SIGKILL)
    until(lambda: mended.pids()[victim] not in (before, 0) and mended.run.endpoint().state is Phase.READY)  # type: ignore[union-attr]
    until(lambda: _serves(mended.endpoint.url, mended.run.api_key()))
    states = json.loads(operator(mended.run.path.parent.parent, "status", "mended", "--json").stdout)["members"]

    assert states[victim]["restarts"] == 1
    assert complete(mended.client, "after it", False).completion_tokens == 40


def test_a_process_that_waits_takes_a_killed_frontends_place(mended: Deployment) -> None:
    """It has imported everything before: the new frontend is no new process."""
    before = mended.pids()["frontend-0"]
    waiting = until_waiting(mended)
    os.kill(before, signal.SIGKILL)
    until(lambda: mended.pids()["frontend-0"] == waiting and _serves(mended.endpoint.url, mended.run.api_key()))

    assert complete(mended.client, "after it", False).completion_tokens == 40


def until_waiting(running: Deployment) -> int:
    """The frontend process that is no member yet, once there is one."""
    found: set[int] = set()

    def there() -> bool:
        frontends = {pid for pid, line in processes_of(running.run).items() if "-m workers.frontend" in line}
        found.update(frontends - set(running.pids().values()))
        return bool(found)

    until(there, 60)
    return found.pop()


def test_requests_are_served_while_the_control_plane_is_away(tmp_path: Path, tiny_model: Path) -> None:
    """NATS and etcd are not on the path of a request."""
    with deployed(tmp_path, *ECHO, f"model.path=tiny:{tiny_model}", name="headless") as running:
        for name in ("nats", "etcd"):
            os.kill(running.pids()[name], signal.SIGSTOP)
        answers = [complete(running.client, f"number {i}", bool(i % 2)) for i in range(20)]
        for name in ("nats", "etcd"):
            os.kill(running.pids()[name], signal.SIGCONT)

    assert {answer.completion_tokens for answer in answers} == {40}


@pytest.mark.slurm
def test_a_slurm_job_is_left_seen_and_ended(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """wait=false returns at once; the operator's commands work without the launching process; scancel leaves nothing."""
    shape = ("cluster=slurm_cpu", "cluster.interface=lo", f"model.path=tiny:{tiny_model}")
    argv = command(tmp_path, *ECHO, *shape, "wait=false", name="job")
    env = {**os.environ, **cluster.env}
    launched = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60, env=env)
    assert launched.returncode == 0, launched.stderr

    def status() -> str:
        argv = [sys.executable, "-m", "launch.status", "job", "--runs-dir", str(tmp_path / "runs")]
        return subprocess.run(argv, check=False, capture_output=True, text=True, env=env, timeout=60).stdout

    until(lambda: "job is ready" in status(), 60)
    hosts = {line.split()[0] for line in cluster.run("squeue", "--noheader", "--format=%D %T").splitlines()}
    stop = [sys.executable, "-m", "launch.stop", "job", "--runs-dir", str(tmp_path / "runs")]
    stopped = subprocess.run(stop, check=False, capture_output=True, text=True, env=env, timeout=120)

    assert hosts == {"4"}
    assert stopped.stdout == "job stopped\n", stopped.stderr
    until(lambda: cluster.run("squeue", "--noheader") == "")


def _serves(url: str, key: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"}).json()["data"])
    except httpx.TransportError:
        return False
