"""The address given to others is one they can reach, or there is none."""

from __future__ import annotations

import socket

import pytest

from launch.errors import LaunchError
from slurm import hosts


def test_loopback_is_among_the_interfaces() -> None:
    """With its address, as the kernel says it."""
    assert hosts.interfaces()["lo"] == "127.0.0.1"


def test_a_name_that_does_not_resolve_says_which_key_to_set() -> None:
    """JSC's suffix on a machine that knows nothing of it."""
    short = socket.gethostname().partition(".")[0]
    with pytest.raises(LaunchError, match=rf"{short}-nosuch.*cannot resolve.*cluster.interface"):
        hosts.address("-nosuch")


@pytest.mark.parametrize(
    ("given", "rank", "found"),
    [
        pytest.param("0,1,2,3", 0, ("0", "1"), id="the first node"),
        pytest.param("0,1,2,3", 1, ("2", "3"), id="the second"),
        pytest.param("GPU-a,GPU-b,GPU-c", 1, ("GPU-c",), id="the last has fewer"),
    ],
)
def test_nodes_of_one_machine_have_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, given: str, rank: int, found: tuple[str, ...]
) -> None:
    """An engine over two such nodes has a GPU on each; what restricts the machine restricts them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert hosts.node_devices(hosts.devices_here(), rank, slots_per_node=2) == found
