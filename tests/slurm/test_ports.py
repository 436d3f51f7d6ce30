"""No two agents on a machine have a port in common."""

from __future__ import annotations

import itertools
import socket

import pytest

from launch.plan import PORT_BLOCK
from slurm import ports


def test_blocks_of_one_machine_do_not_overlap() -> None:
    """The same job and rank claimed twice, as by two deployments of one name, get different blocks."""
    blocks = [ports.claim("job", 0) for _ in range(3)]
    try:
        bases = sorted(block.base for block in blocks)

        assert all(second - first >= PORT_BLOCK for first, second in itertools.pairwise(bases))
        assert all(ports.FIRST <= base <= ports.LAST - PORT_BLOCK + 1 for base in bases)
    finally:
        for block in blocks:
            block.close()


def test_a_block_with_a_port_in_use_is_passed_over() -> None:
    """Somebody else's server anywhere in the block is noticed by binding."""
    with ports.claim("busy", 0) as free:
        base = free.base
    with socket.socket() as other:
        other.bind(("127.0.0.1", base + 40))
        other.listen()
        with ports.claim("busy", 0) as block:
            assert block.base != base


def test_nobody_can_connect_to_the_port_that_holds_a_block() -> None:
    """It is bound, so that nobody else binds it whatever he allows, and does not listen."""
    with ports.claim("held", 0) as block, socket.socket() as other, socket.socket() as client:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", block.base))
        with pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", block.base))


def test_a_closed_block_is_free_again() -> None:
    """The guard is all that holds it."""
    with ports.claim("again", 1) as block:
        base = block.base
    with ports.claim("again", 1) as block:
        assert block.base == base
