"""A node that is not fit is named with its device, the reason and what to do, before an engine starts on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from launch.compose import read
from launch.errors import LaunchError
from launch.plan import plan
from launch.recipe import Launcher, Recipe
from launch.records import Job, RunDirectory
from slurm import fabric, gpus, preflight, probe
from slurm.agent import Agent
from slurm.preflight import Facts, Finding, Grade, PreflightError, Report
from slurm.probe import Link
from tests.deployments import command
from tests.slurm import machines
from tests.slurm.test_fabric import ADDRESSES
from tests.slurm_cluster import SlurmCluster

# In the form of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` (driver 560): two of eight GPUs, the second with
# another's process, memory errors and MIG.
QUERY = """\
0, GPU-6b1e7a2c-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 00000000:1B:00.0, 81559, 4, 0, Disabled
1, GPU-6b1e7a2c-0000-0000-0000-000000000001, NVIDIA H100 80GB HBM3, 00000000:2B:00.0, 81559, 40312, 3, Enabled
"""
PAGE = "| NVIDIA-SMI 560.35.03     Driver Version: 560.35.03     CUDA Version: 12.6     |\n"


def recipe(*overrides: str) -> Recipe:
    """Two engines of one GPU each on two nodes with InfiniBand."""
    one = [f"roles.{kind}.tensor_parallel=1" for kind in ("prefill", "decode")]
    return read(["+recipe=llama70b_disagg", "cluster=generic_ib", "cluster.gpus_per_node=1", *one, *overrides]).recipe


def facts(folder: Path, machine: str = "dgx_h100") -> Facts:
    """A node that is fit."""
    snapshot = fabric.read(ADDRESSES[machine], getattr(machines, machine)(folder))
    states = gpus.parse(QUERY)[:1]
    return Facts(host="nid001", snapshot=snapshot, gpus=states, driver_cuda="12.6", torch_cuda="12.6")


def judged(found: Facts, asked: Recipe | None = None) -> dict[str, Finding]:
    """What is wrong with rank 1, by name."""
    asked = asked or recipe()
    findings = preflight.judge(found, asked, plan(asked), 1, None)
    return {finding.name: finding for finding in findings if finding.grade is not Grade.OK}


def test_a_sound_node_passes(tmp_path: Path) -> None:
    """Every test says what it found."""
    found = preflight.judge(facts(tmp_path), recipe(), plan(recipe()), 1, None)

    assert {finding.name: finding.grade for finding in found} == dict.fromkeys(
        ("model", "disk", "shm", "rdma", "memlock", "gpus", "gpudirect"), Grade.OK
    )


@pytest.mark.parametrize(
    ("changed", "name", "what"),
    [
        pytest.param({"gpus": ()}, "gpus", "nid001 gives 0 GPUs and its engines need 1", id="GPU missing"),
        pytest.param({"gpus_error": "GPU 3 is lost"}, "gpus", "nid001: GPU 3 is lost", id="GPU lost"),
        pytest.param(
            {"gpus": gpus.parse(QUERY)[1:]}, "ecc", r"GPU 1 of nid001 \(0000:2b:00.0\) has had 3 uncorr", id="ECC"
        ),
        pytest.param({"gpus": gpus.parse(QUERY)[1:]}, "gpu_memory", "has 40312 MiB in use by somebody", id="dirty"),
        pytest.param({"gpus": gpus.parse(QUERY)[1:]}, "mig", "is split", id="MIG"),
        pytest.param(
            {"torch_cuda": "13.0"}, "cuda", "CUDA 13.0 and the driver of nid001 serves up to 12.6", id="driver"
        ),
        pytest.param({"memlock": 8 << 20}, "memlock", "may lock 8192 KiB", id="memlock"),
        pytest.param({"shm_free": 64 << 20}, "shm", "64 MiB left and engines need 1024", id="shared memory"),
        pytest.param({"run_free": 5 << 20}, "disk", "5 MiB left", id="full disk"),
        pytest.param({"gpudirect": False}, "gpudirect", "neither nvidia_peermem nor", id="no GPUDirect"),
        pytest.param({"model_error": "[Errno 2] config.json"}, "model", r"nid001: \[Errno 2\]", id="model"),
        pytest.param({"port_taken": 8000}, "port", "port 8000 is taken on nid001", id="port"),
    ],
)
def test_each_fault_is_named(changed: dict[str, object], name: str, what: str, tmp_path: Path) -> None:
    """With the node, the device and a fix."""
    found = judged(replace(facts(tmp_path), **changed))  # type: ignore[arg-type]  # the table's types vary by row

    assert re.search(what, found[name].what)
    assert found[name].fix


@pytest.mark.parametrize("machine", ["laptop", "gh200"])
def test_tcp_is_refused_where_rdma_was_promised_unless_it_is_accepted(machine: str, tmp_path: Path) -> None:
    """The profile says InfiniBand, the node has none."""
    node = facts(tmp_path, machine)

    refused, accepted = judged(node)["rdma"], judged(node, recipe("preflight.ignore=[rdma]"))["rdma"]

    assert refused.grade is Grade.FAILED
    assert "KV cache would go over TCP" in refused.what
    assert "slurm.sbatch.exclude=nid001" in refused.fix
    assert accepted.grade is Grade.WARNING


def test_no_node_is_named_where_the_site_forbids_it(tmp_path: Path) -> None:
    """TACC deletes jobs that do."""
    asked = recipe("cluster=vista")

    assert judged(facts(tmp_path, "laptop"), asked)["rdma"].fix.startswith("submit again for other nodes")


@pytest.mark.parametrize(
    ("link", "name", "what"),
    [
        (
            {"error": "no answer within 20 s"},
            "peer",
            r"rank 0 \(nid000\) cannot be reached at 10.0.0.1:24004: no answer",
        ),
        ({"skew_s": -30.5}, "clock", "is -30.5 s off ours, more than 10"),
        ({"gbit_per_s": 0.9}, "rate", "sends 0.9 Gbit/s over TCP, less than 5"),
    ],
)
def test_a_bad_way_to_a_peer_names_the_peer(link: dict[str, object], name: str, what: str) -> None:
    """And the node to leave out."""
    asked = recipe("preflight.min_gbit_per_s=5")
    good = Link(peer=0, host="nid000", address="10.0.0.1:24004", gbit_per_s=9.0)
    (found,) = preflight.judge_links([msgspec.structs.replace(good, **link)], asked)

    assert (found.name, found.grade) == (name, Grade.FAILED)
    assert re.search(what, found.what)
    assert "exclude=nid000" in found.fix
    assert [finding.grade for finding in preflight.judge_links([good], asked)] == [Grade.OK]


def test_decode_tests_prefill_and_everybody_rank_0() -> None:
    """Those who will connect to each other, and no more than sixteen of them."""
    small = plan(read(["+recipe=tiny_2p2d", "cluster=slurm_cpu"]).recipe)
    sizes = ["roles.prefill.replicas=40", "roles.decode.replicas=2"]
    large = plan(read(["+recipe=tiny_disagg", "cluster=slurm_cpu", *sizes]).recipe)

    assert [preflight.peers(small, rank) for rank in range(4)] == [(), (0,), (0, 1), (0, 1)]
    assert preflight.peers(large, 41) == tuple(range(16))


@pytest.mark.parametrize("text", ["Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.", "a, b"])
def test_what_nvidia_smi_says_of_a_lost_gpu_is_passed_on(text: str) -> None:
    """It prints that between the lines of the others."""
    with pytest.raises(LaunchError, match="nvidia-smi says"):
        gpus.parse(QUERY + text + "\n")


def test_gpus_are_those_that_the_rank_was_given() -> None:
    """By index or by name, in the order of the slots."""
    states = gpus.parse(QUERY)

    assert [state.bus for state in gpus.given(states, None)] == ["0000:1b:00.0", "0000:2b:00.0"]
    assert [state.index for state in gpus.given(states, ("1", "0"))] == [1, 0]
    assert [state.index for state in gpus.given(states, (states[1].uuid,))] == [1]
    assert gpus.cuda_version(PAGE) == "12.6"


# --- over real sockets ----------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.asynccontextmanager
async def answering(**how: object) -> AsyncIterator[int]:
    """A peer that answers on the port."""
    port = free_port()
    server = await probe.start("127.0.0.1", port, **how)  # type: ignore[arg-type]  # as the test says
    try:
        yield port
    finally:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:  # they notice that the client has gone
            await asyncio.wait(others, timeout=5)


async def test_the_way_to_a_peer_is_measured() -> None:
    """Latency, rate and, as both are this machine, no skew."""
    async with answering() as port:
        link = await probe.measure(3, "n3", "127.0.0.1", port, 5)

    assert link.error is None
    assert 0 < link.latency_ms < 1000
    assert link.gbit_per_s > 0.05
    assert abs(link.skew_s) < 0.5


async def test_a_clock_that_is_off_is_seen() -> None:
    """By half an hour, whatever the latency."""
    async with answering(clock=lambda: time.time() - 1800) as port:
        link = await probe.measure(3, "n3", "127.0.0.1", port, 5)

    assert link.skew_s == pytest.approx(-1800, abs=1)


async def test_a_slow_link_is_seen() -> None:
    """256 KiB every 50 ms are 42 Mbit/s."""
    async with answering(pace_s=0.05) as port:
        link = await probe.measure(3, "n3", "127.0.0.1", port, 5)

    assert 0 < link.gbit_per_s < 0.1


async def test_a_peer_that_is_not_there_is_an_error_and_so_is_one_that_is_silent() -> None:
    """At once, and after the timeout."""
    closed = await probe.measure(3, "n3", "127.0.0.1", free_port(), 5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = await probe.measure(3, "n3", "127.0.0.1", mute.getsockname()[1], 0.3)

    assert "Connect call failed" in str(closed.error)
    assert silent.error == "no answer within 0.3 s"


SERVE = (
    "import asyncio, sys; from slurm import probe\n"
    "async def main():\n"
    "    async with await probe.start(sys.argv[1], int(sys.argv[2])) as server:\n"
    "        print('ready', flush=True); await server.serve_forever()\n"
    "asyncio.run(main())"
)


@pytest.fixture
def behind_50_mbit() -> Iterator[tuple[str, str]]:
    """A network namespace whose packets to us the kernel holds back to 50 Mbit/s: its name, and its address."""
    name, net = f"bt{os.getpid()}", f"10.213.{os.getpid() % 250}"
    commands = [
        f"ip netns add {name}",
        f"ip link add {name}a type veth peer name {name}b netns {name}",
        f"ip address add {net}.1/24 dev {name}a",
        f"ip link set {name}a up",
        f"ip -n {name} address add {net}.2/24 dev {name}b",
        f"ip -n {name} link set {name}b up",
        f"tc -n {name} qdisc add dev {name}b root tbf rate 50mbit burst 64kb latency 400ms",
    ]
    try:
        for each in commands:
            subprocess.run(each.split(), check=True, capture_output=True)
        yield name, f"{net}.2"
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace and tc need root")
async def test_a_link_that_is_slow_is_named_by_the_preflight(behind_50_mbit: tuple[str, str]) -> None:
    """The least rate of the recipe is 0.2 Gbit/s."""
    name, address = behind_50_mbit
    argv = ["ip", "netns", "exec", name, sys.executable, "-c", SERVE, address, "5005"]
    peer = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    try:
        assert peer.stdout
        async with asyncio.timeout(60):
            assert await peer.stdout.readline() == b"ready\n"
        link = await probe.measure(1, "n1", address, 5005, 30)
    finally:
        peer.kill()
        await peer.wait()
    (found,) = preflight.judge_links([link], recipe("preflight.min_gbit_per_s=0.2"))

    assert link.error is None
    assert 0.005 < link.gbit_per_s < 0.1
    assert (found.name, found.grade) == ("rate", Grade.FAILED)
    assert re.search(r"rank 1 \(n1\) sends 0\.0\d* Gbit/s over TCP, less than 0\.2", found.what)


async def test_a_preflight_that_waits_for_other_ranks_heeds_the_stop_file(tmp_path: Path, tiny_model: Path) -> None:
    """Rank 1 never comes, and whoever launched has had enough."""
    words = ["+recipe=tiny_disagg", "engine.backend=echo", "cluster=slurm_cpu", "cluster.interface=lo"]
    asked = read([*words, f"model.path={tiny_model}", "preflight.only=true"]).recipe
    run = RunDirectory(tmp_path / "run")
    where = plan(asked)
    run.prepare(asked, where, 1)
    job = Job(launcher=Launcher.SLURM, attempt=1, id="1", host="here", submitted_at=time.time())
    agent = asyncio.create_task(Agent(run, asked, where, job, 0, asyncio.Event()).run("preflight-only"))
    async with asyncio.timeout(60):
        while not (run.path / "preflight" / "0.json").exists():
            assert not agent.done(), agent.exception()
            await asyncio.sleep(0.05)
        assert not agent.done()
        run.stop_file.touch()
        await agent

    rank = run.rank(1, 0)
    assert rank
    assert rank.ended
    assert rank.failure is None


# --- on a real Slurm ------------------------------------------------------------------------------------------------


@pytest.mark.slurm
def test_planted_faults_end_the_job_with_all_of_them(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """No weights, one GPU of two, locked memory limited, the frontend's port taken, no RDMA, a slow link: one launch, and
    every node says what is wrong with it before an engine starts."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((tiny_model / "config.json").read_text())
    fake = tmp_path / "bin"
    fake.mkdir()
    # A machine without a GPU: what nvidia-smi prints stands in for the driver.
    first = QUERY.splitlines()[0]
    (fake / "nvidia-smi").write_text(f"#!/bin/sh\n[ $# -eq 0 ] && echo 'CUDA Version: 12.6' || echo '{first}'\n")
    (fake / "nvidia-smi").chmod(0o755)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        words = [
            *("+recipe=llama70b_disagg", "cluster=generic_ib", "cluster.interface=lo", "cluster.gpus_per_node=2"),
            *("cluster.gpu_request=null", "roles.prefill.tensor_parallel=2", "roles.decode.tensor_parallel=2"),
            *(f"model.path={model}", f"frontend.port={taken.getsockname()[1]}", "preflight.min_gbit_per_s=100000"),
            f"slurm.setup=['export PATH={fake}:$PATH', 'ulimit -l 64']",
            "slurm.srun_args=['--propagate=MEMLOCK']",
        ]
        done = subprocess.run(
            command(tmp_path, *words, name="planted"),
            check=False, capture_output=True, text=True, timeout=120, env={**os.environ, **cluster.env},
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is not fit to serve" in done.stderr
    assert f"{model} holds no weights" in done.stderr
    assert "gives 1 GPUs and its engines need 2" in done.stderr
    assert "may lock 64 KiB" in done.stderr
    assert "to start all the same: preflight.ignore=[" in done.stderr
    reports = json.loads((tmp_path / "runs" / "planted" / "preflight.json").read_text())
    failed = [{item["name"] for item in report["findings"] if item["grade"] == "failed"} for report in reports]

    assert failed[0] == {"model", "gpus", "port"}  # nobody to connect to: rank 0's network is tested by the others
    assert failed[1] == {"model", "gpus", "memlock", "rdma", "gpudirect", "rate"}
    assert not list((tmp_path / "runs" / "planted" / "logs" / "latest").glob("prefill-*.log"))


def test_the_error_names_what_to_ignore() -> None:
    """For whoever wants to start all the same."""
    bad = Finding(name="rdma", grade=Grade.FAILED, what="no RDMA device", fix="submit again")
    report = Report(attempt=1, rank=2, host="nid007", findings=[bad], links=[], seconds=0.1)

    assert "node nid007 (rank 2)" in str(PreflightError(report))
    assert "preflight.ignore=[rdma]" in str(PreflightError(report))
    assert "rank 2 on nid007: failed" in preflight.table([report])
