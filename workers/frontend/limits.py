"""How long and how much a frontend waits for the two sides of a client: bounds that keep one client from costing the others."""

from __future__ import annotations

import resource
from dataclasses import dataclass

SLOWEST_BODY_BYTES_S = 64 << 10
SPARE_DESCRIPTORS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What a connection may do.

    Attributes:
        connections: Connections at once; one more is answered with 503 and closed.
        keep_alive_s: Seconds that a connection may be open without a request.
        request_s: Seconds that a request may take to arrive, its head and body; a body gets more, by its size, as long as
            it comes at 64 KiB/s.
        reader_s: Seconds that a client may take nothing of what waits for it.
        unsent_bytes: Bytes of a stream that may wait for a slow client, beside 64 KiB and what the kernel holds.
    """

    connections: int = 16384
    keep_alive_s: float = 75.0
    request_s: float = 30.0
    reader_s: float = 30.0
    unsent_bytes: int = 1 << 20

    def arrives_by(self, size: int) -> float:
        """Seconds after its first byte until a request of which `size` bytes have come must be whole."""
        return self.request_s + size / SLOWEST_BODY_BYTES_S


def raise_descriptor_limit(wanted: int) -> int:
    """Allow this process as many connections as wanted, or as the system lets it; returns how many those are.

    Shells start with 1024 descriptors, which a thousand streams use up.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted + SPARE_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, wanted + SPARE_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, soft - SPARE_DESCRIPTORS)
