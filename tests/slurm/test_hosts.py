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
