"""Nodes measure the ways between all of them; here each is a network namespace behind a router, or a process."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from launch.compose import read
from launch.records import write
from slurm.matrix import Asked, Meeting
from slurm.pairs import Found, Matrix, matrix, verdict

SECRET = bytes(range(32))
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and tc need root")


@contextlib.contextmanager
def routed(size: int, more: list[str]) -> Iterator[list[str]]:
    """Namespaces with the addresses 10.214.0.2, 10.214.1.2 ... behind a router in another; {0} in `more` is the first's name."""
    router, names = f"bm{os.getpid()}r", [f"bm{os.getpid()}n{index}" for index in range(size)]
    commands = [f"ip netns add {router}", f"ip netns exec {router} sysctl -w net.ipv4.ip_forward=1"]
    for index, name in enumerate(names):
        commands += [
            f"ip netns add {name}",
            f"ip -n {router} link add port{index} type veth peer name fab0 netns {name}",
            f"ip -n {router} address add 10.214.{index}.1/24 dev port{index}",
            f"ip -n {router} link set port{index} up",
            f"ip -n {name} address add 10.214.{index}.2/24 dev fab0",
            f"ip -n {name} link set fab0 up",
            f"ip -n {name} route add default via 10.214.{index}.1",
        ]
    try:
        for each in [*commands, *(line.format(*names) for line in more)]:
            subprocess.run(each.split(), check=True, capture_output=True)
        yield names
    finally:
        for name in [*names, router]:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def measured(folder: Path, namespaces: list[str], timeout_s: float = 120) -> Matrix:
    """Let a process in each namespace take part; what they found together."""
    cluster = read(["+recipe=tiny_agg", "cluster=slurm_cpu", "cluster.interface=fab"]).recipe.cluster
    asked = Asked(size=len(namespaces), cluster=cluster, secret=SECRET, sockets="a test")
    write(folder / "asked.json", msgspec.json.encode(asked))
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "slurm.matrix", str(folder), str(rank)],
            env={**os.environ, "SLURMD_NODENAME": f"n{rank + 1}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(namespaces)
    ]
    try:
        said = [process.communicate(timeout=timeout_s)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    meeting = Meeting(folder)
    found = [item for rank in range(len(namespaces)) if (item := meeting.get("found", rank, Found))]
    assert len(found) == len(namespaces), said
    return matrix(found)


@ROOT
def test_a_node_that_sends_slowly_is_named_by_its_directions(tmp_path: Path) -> None:
    """The kernel holds back what the third of three nodes sends to 100 Mbit/s: both its ways out are slow, and no other."""
    throttle = "tc -n {2} qdisc add dev fab0 root tbf rate 100mbit burst 256kb latency 400ms"
    with routed(3, [throttle]) as namespaces:
        found = measured(tmp_path, namespaces)

    told = verdict(found)
    rates = [line.split(":")[0] for line in told.slow if "GB/s" in line]
    assert found.over == "sockets (a test)"
    assert found.errors == []
    assert sorted(rates) == ["n3 -> n1", "n3 -> n2"]
    assert all(0.005 < (found.gb_per_s[2][peer] or 0) < 0.0135 for peer in (0, 1))
    assert all((found.latency_us[a][b] or 0) > 0 for a, b in itertools.permutations(range(3), 2))


@ROOT
@pytest.mark.nightly
def test_a_pair_without_a_way_is_named_and_the_others_are_measured(tmp_path: Path) -> None:
    """The first node cannot reach the second one; it says why, and nobody waits for ever."""
    with routed(4, ["ip -n {0} route add unreachable 10.214.1.2/32"]) as namespaces:
        found = measured(tmp_path, namespaces)

    assert verdict(found).slow[0] == "n1 - n2: not measured"
    assert len(found.errors) == 1
    assert found.errors[0].startswith("n1 - n2: 10.214.1.2:")
    there = [(a, b) for a, b in itertools.permutations(range(4), 2) if {a, b} != {0, 1}]
    assert all(found.gb_per_s[a][b] and found.latency_us[a][b] for a, b in there)


def test_a_node_without_the_folder_says_what_to_set(tmp_path: Path) -> None:
    """The runs directory is on a disk of one node only."""
    argv = [sys.executable, "-m", "slurm.matrix", str(tmp_path / "elsewhere"), "0"]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    assert "set runs_dir to a folder that all nodes share" in done.stdout


def test_a_process_that_is_told_to_end_ends(tmp_path: Path) -> None:
    """Also while it waits for nodes that do not come, as after scancel."""
    cluster = read(["+recipe=tiny_agg", "cluster=slurm_cpu", "cluster.interface=lo"]).recipe.cluster
    write(tmp_path / "asked.json", msgspec.json.encode(Asked(size=2, cluster=cluster, secret=SECRET, sockets="a test")))
    process = subprocess.Popen([sys.executable, "-m", "slurm.matrix", str(tmp_path), "0"])
    try:
        while not (tmp_path / "standing-0.json").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)

        assert process.wait(20) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
