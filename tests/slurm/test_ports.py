"""No two agents on a machine have a port in common."""

from __future__ import annotations

import itertools
import socket

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


def test_a_closed_block_is_free_again() -> None:
    """The guard is all that holds it."""
    with ports.claim("again", 1) as block:
        base = block.base
    with ports.claim("again", 1) as block:
        assert block.base == base
