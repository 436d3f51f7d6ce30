"""A real NIXL transfer between two nodes, from memory to memory, as prefill and decode engines will make them.

`python -m slurm.nixl_probe offer ADDRESS PORT BACKEND` holds a buffer and hands its description to whoever connects;
`... read ADDRESS PORT BACKEND SECONDS` pulls it, compares every byte, and prints the rate. Processes of their own: NIXL's agents keep
threads and devices, and loading it takes seconds that the agent of a node does not have.

Host memory to host memory: it shows that UCX or libfabric finds a way over this node's devices, not that GPU memory can be
registered with them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import time
from typing import Any

BYTES = 64 << 20
BLOCKS = 16
TIMEOUT_S = 15.0
PATTERN = 251


def main() -> int:
    """Offer until the standard input closes, or read once; 0 when all bytes came."""
    role, address, port, backend = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    import numpy as np
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(f"{role}-{address}-{port}-{time.time_ns()}", nixl_agent_config(backends=[backend]))
    data = np.zeros(BYTES, dtype=np.uint8)
    if role == "offer":
        data[:] = np.arange(BYTES, dtype=np.uint32) % PATTERN
    size = BYTES // BLOCKS
    here = [(data.ctypes.data + i * size, size, 0) for i in range(BLOCKS)]
    agent.register_memory([(data.ctypes.data, BYTES, 0, "")], "DRAM")
    if role == "offer":
        return _offer(agent, here, address, port)
    rate = _read(agent, here, address, port, float(sys.argv[5]))
    wrong = int((data != np.arange(BYTES, dtype=np.uint32) % PATTERN).sum())
    print(json.dumps({"gbit_per_s": rate, "wrong_bytes": wrong}))
    return 1 if wrong else 0


def _offer(agent: Any, blocks: list[tuple[int, int, int]], address: str, port: int) -> int:
    """Hand metadata and descriptors to every reader; the agent of the node ends us."""
    descriptors = agent.get_serialized_descs(agent.get_xfer_descs(blocks, "DRAM"))
    metadata = agent.get_agent_metadata()
    with socket.create_server((address, port)) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(TIMEOUT_S)
                for part in (metadata, descriptors):
                    connection.sendall(struct.pack("!q", len(part)) + part)


def _read(agent: Any, blocks: list[tuple[int, int, int]], address: str, port: int, timeout_s: float) -> float:
    """Pull the buffer of the offering side, and pull it again for the rate; in Gbit/s."""
    with _connected(address, port, timeout_s) as connection:
        metadata, descriptors = (_part(connection) for _ in range(2))
    peer = agent.add_remote_agent(metadata)
    there = agent.deserialize_descs(descriptors)
    best = 0.0
    for _ in range(2):  # the first makes the connection
        handle = agent.initialize_xfer("READ", agent.get_xfer_descs(blocks, "DRAM"), there, peer)
        begun = time.perf_counter()
        state = agent.transfer(handle)
        while state == "PROC":
            if time.perf_counter() - begun > timeout_s:
                raise SystemExit(f"the transfer was not done after {timeout_s:.0f} s")
            time.sleep(0.0005)
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise SystemExit(f"NIXL says {state} of the transfer")
        best = max(best, BYTES * 8 / (time.perf_counter() - begun) / 1e9)
        agent.release_xfer_handle(handle)
    agent.remove_remote_agent(peer)
    return round(best, 3)


def _connected(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to the offering side, which takes seconds to load NIXL."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((address, port), timeout_s)
        except OSError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"nobody offers a block at {address}:{port} ({error})") from None
        time.sleep(0.2)


def _part(connection: socket.socket) -> bytes:
    (length,) = struct.unpack("!q", _exactly(connection, 8))
    return _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        data = connection.recv(count - len(received))
        if not data:
            raise SystemExit("the offering side closed the connection")
        received += data
    return bytes(received)


if __name__ == "__main__":
    sys.exit(main())
