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
