"""Ports: one place that decides them.

A rank claims a block of consecutive ports on its node and holds it with a bound *guard* socket on the first of them, so
that no two agents on a machine share a block, whoever started them. The other ports of the block are tested by binding
before the block is taken. Where a claim begins to look depends on the job, so that deployments rarely meet at all.
"""

from __future__ import annotations

import hashlib
import socket
from types import TracebackType
from typing import Self

from launch.errors import LaunchError
from launch.plan import PORT_BLOCK

# Below the ephemeral range of Linux (32768 and up), which other programs' outgoing connections use.
FIRST = 20000
LAST = 32767
BLOCKS = (LAST - FIRST + 1) // PORT_BLOCK


class PortBlock:
    """`PORT_BLOCK` ports of this node that are ours until the block is closed."""

    def __init__(self, base: int, guard: socket.socket) -> None:
        self.base = base
        self._guard = guard

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the block."""
        self._guard.close()


def claim(job: str, rank: int) -> PortBlock:
    """Take the first free block, starting from one that the job and the rank point to.

    Args:
        job: Anything that tells this deployment's attempt from others.
        rank: Rank of the agent; ranks that share a machine (tests, local launches) start apart.

    Raises:
        LaunchError: Every block has a port in use.
    """
    start = int.from_bytes(hashlib.sha256(f"{job}/{rank}".encode()).digest()[:4], "big") % BLOCKS
    for step in range(BLOCKS):
        base = FIRST + (start + step) % BLOCKS * PORT_BLOCK
        guard = hold(base)
        if guard is None:
            continue
        if all(is_free(port) for port in range(base + 1, base + PORT_BLOCK)):
            return PortBlock(base, guard)
        guard.close()
    raise LaunchError(f"no {PORT_BLOCK} consecutive free ports between {FIRST} and {LAST} on {socket.gethostname()}")


def hold(port: int) -> socket.socket | None:
    """A socket that keeps the port from others without listening, so that nobody can connect to it; None when it is taken.

    Without SO_REUSEADDR no second socket binds the port, whatever options it has. The other reason for that option, old
    connections in TIME_WAIT, does not arise where nobody connects.
    """
    candidate = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        candidate.bind(("0.0.0.0", port))
    except OSError:
        candidate.close()
        return None
    return candidate


def is_free(port: int) -> bool:
    """Whether a server could bind the port on every address of this node right now."""
    probe = bind(port)
    if probe is None:
        return False
    probe.close()
    return True


def bind(port: int) -> socket.socket | None:
    """A socket bound to the port on every address and to nobody else's use, or None when the port is taken.

    SO_REUSEADDR lets a port be bound whose old connections are in TIME_WAIT; a second socket is still refused as soon as one
    of the two listens, so that this one does, for the moment that it lives.
    """
    candidate = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        candidate.bind(("0.0.0.0", port))  # the test must cover every address that a child may bind
        candidate.listen(1)
    except OSError:
        candidate.close()
        return None
    return candidate
