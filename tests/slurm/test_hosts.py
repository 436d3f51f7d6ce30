"""The address given to others is one they can reach, or there is none."""

from __future__ import annotations

import pytest

from launch.errors import LaunchError
from slurm import hosts


def test_an_interface_is_found_by_its_prefix() -> None:
    """Loopback only because it was asked for by name."""
    assert hosts.address("lo") == "127.0.0.1"


def test_an_unknown_interface_lists_the_known_ones() -> None:
    """With their addresses."""
    with pytest.raises(LaunchError, match=r"no interface hsn\*.*lo \(127\.0\.0\.1\)"):
        hosts.address("hsn")


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
