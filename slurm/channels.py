"""What carries a broadcast from node to node: sockets, or MPI.

Sockets prove to each other that they know the deployment's secret before anything is sent. Neither of the two hides what
it carries: weights are no secret of the deployment, and every piece has a checksum.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from slurm.broadcast import HEADER
from slurm.weights import StagingError

NONCE = PROOF = 32
PROVE_S = 10.0
BUFFER = 4 << 20
POLL_S = 0.0002
SILENT_S = 120.0

Buffer = TypeVar("Buffer", bytearray, memoryview)


class SocketChannel:
    """One connection to the next node, and one from the one before."""

    def __init__(self, onward: socket.socket, inward: socket.socket) -> None:
        self._onward = onward
        self._inward = inward

    def send(self, header: bytes, payload: bytes | bytearray) -> None:
        """Send to the next node."""
        self._onward.sendall(header)
        if payload:
            self._onward.sendall(payload)

    def receive_header(self) -> bytes:
        """Wait for the next header."""
        return bytes(exactly(self._inward, bytearray(HEADER.size)))

    def receive_payload(self, into: bytearray) -> None:
        """Fill the buffer."""
        exactly(self._inward, into)

    def abort(self) -> None:
        """Close both ways."""
        for connection in (self._onward, self._inward):
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)


class MpiChannel:
    """The neighbours in a communicator whose ranks are the places in the ring.

    Waiting polls and sleeps: MPI's own waiting keeps a core busy, and engines' imports want it.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._next = (comm.rank + 1) % comm.size
        self._before = (comm.rank - 1) % comm.size
        self._aborted = False

    def send(self, header: bytes, payload: bytes | bytearray) -> None:
        """Send to the next node."""
        self._wait(self._comm.Isend(header, self._next, tag=1))
        if payload:
            self._wait(self._comm.Isend(payload, self._next, tag=2))

    def receive_header(self) -> bytes:
        """Wait for the next header."""
        into = bytearray(HEADER.size)
        self._wait(self._comm.Irecv(into, self._before, tag=1))
        return bytes(into)

    def receive_payload(self, into: bytearray) -> None:
        """Fill the buffer."""
        self._wait(self._comm.Irecv(into, self._before, tag=2))

    def abort(self) -> None:
        """End the waits of this process; its end is what ends those of the others, as MPI aborts all together."""
        self._aborted = True

    def _wait(self, request: Any) -> None:
        deadline = time.monotonic() + SILENT_S
        while not request.Test():
            if self._aborted:
                raise StagingError("the broadcast was given up")
            if time.monotonic() > deadline:
                raise StagingError(f"a neighbour was silent for {SILENT_S:.0f} s")
            time.sleep(POLL_S)


@contextlib.contextmanager
def socket_ring(
    addresses: Sequence[tuple[str, int]], place: int, secret: bytes, timeout_s: float
) -> Iterator[SocketChannel]:
    """Connect with both neighbours; `addresses` are where each place of the ring listens.

    Raises:
        StagingError: A neighbour did not come in time.
    """
    onward = addresses[(place + 1) % len(addresses)]
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.create_server(addresses[place], backlog=8))
            with ThreadPoolExecutor(2) as pool:  # each neighbour does both at once
                coming = pool.submit(accept, listener, secret, timeout_s)
                going = pool.submit(connect, onward, secret, timeout_s)
            for each in (going, coming):
                if each.exception() is None:
                    stack.enter_context(each.result())
            connections = [each.result() for each in (going, coming)]
        except (OSError, EOFError) as error:
            raise StagingError(f"the ring of nodes did not close at {addresses[place][0]}: {error}") from error
        for connection in connections:
            connection.settimeout(SILENT_S)
        yield SocketChannel(*connections)


def connect(address: tuple[str, int], secret: bytes, timeout_s: float) -> socket.socket:
    """A connection to a node that knows the secret, once it listens."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection = _tuned(socket.create_connection(address, timeout_s))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
            continue
        ours = secrets.token_bytes(NONCE)
        try:
            connection.sendall(ours)
            answer = bytes(exactly(connection, bytearray(NONCE + PROOF)))
        except BaseException:
            connection.close()
            raise
        theirs, proof = answer[:NONCE], answer[NONCE:]
        if not hmac.compare_digest(proof, _proof(secret, b"accepts", ours, theirs)):
            connection.close()
            raise ConnectionError(f"who listens at {address[0]}:{address[1]} is no member of this deployment")
        connection.sendall(_proof(secret, b"connects", ours, theirs))
        return connection


def accept(listener: socket.socket, secret: bytes, timeout_s: float) -> socket.socket:
    """The first connection from somebody who knows the secret; the others are closed."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        connection, _ = listener.accept()
        connection.settimeout(min(left, PROVE_S))
        with contextlib.suppress(OSError, EOFError):
            theirs, ours = bytes(exactly(connection, bytearray(NONCE))), secrets.token_bytes(NONCE)
            connection.sendall(ours + _proof(secret, b"accepts", theirs, ours))
            proof = bytes(exactly(connection, bytearray(PROOF)))
            if hmac.compare_digest(proof, _proof(secret, b"connects", theirs, ours)):
                return _tuned(connection)
        connection.close()
    raise TimeoutError("no neighbour came")


def _proof(secret: bytes, side: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, b"baton weights " + side + first + second, "sha256")


def _tuned(connection: socket.socket) -> socket.socket:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def exactly(connection: socket.socket, into: Buffer) -> Buffer:
    """Fill the buffer.

    Raises:
        EOFError: The other side closed the connection first.
    """
    view, done = memoryview(into), 0
    while done < len(into):
        count = connection.recv_into(view[done:])
        if not count:
            raise EOFError("a neighbour closed the connection")
        done += count
    return into
