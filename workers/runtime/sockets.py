"""ZMQ sockets on an asyncio loop, without a future for every message.

`zmq.asyncio` allocates futures and polls for each receive; here the loop watches the socket's descriptor and one callback
drains it. The descriptor is edge-triggered: it fires once for any number of messages, and using the socket in any way may
swallow the edge, so that reading goes on, turn by turn, until nothing is left, and each send looks for input again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

# Messages, not bytes, that may wait for a peer: a step of a worker is one message, so this is minutes of them.
HIGH_WATER = 10_000
# Messages that are read in one turn of the loop: a peer that never stops sending must not keep everything else waiting.
TURN = 16
# A path that swallows packets, or a host that is gone without a word, ends the connection after so long. Kernels talk to each
# other here, so that a process that is merely stopped keeps its connections.
DEAD_PATH_S = 12
KEEPALIVE_IDLE_S, KEEPALIVE_EVERY_S = 4, 2
CONNECT_TIMEOUT_S = 3
HANDSHAKE_S = 5
# As plain numbers: pyzmq's flags are enumerations, and putting two together costs as much as sending does.
DO_NOT_WAIT, MORE_FOLLOWS, READABLE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)


class LoopSocket:
    """A bound or connected socket whose messages go to a callback in the loop."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], kind: int, on_message: Callable[[list[bytes]], None]
    ) -> None:
        self.raw = context.socket(kind)
        self.raw.setsockopt(zmq.LINGER, 0)
        self.raw.setsockopt(zmq.SNDHWM, HIGH_WATER)
        self.raw.setsockopt(zmq.RCVHWM, HIGH_WATER)
        self.raw.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self.raw.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
        self.raw.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_EVERY_S)
        self.raw.setsockopt(zmq.TCP_KEEPALIVE_CNT, (DEAD_PATH_S - KEEPALIVE_IDLE_S) // KEEPALIVE_EVERY_S)
        self.raw.setsockopt(zmq.TCP_MAXRT, 1000 * DEAD_PATH_S)
        # A first packet that got lost on a path that is good by now would else be sent again after up to a minute.
        self.raw.setsockopt(zmq.CONNECT_TIMEOUT, 1000 * CONNECT_TIMEOUT_S)
        self.raw.setsockopt(zmq.HANDSHAKE_IVL, 1000 * HANDSHAKE_S)
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._descriptor = self.raw.FD
        self._loop.add_reader(self._descriptor, self._drain)
        # Until a socket was read empty once, ZMQ takes its owner for awake and does not signal the descriptor at all.
        self._loop.call_soon(self._drain)

    def send(self, parts: list[bytes]) -> bool:
        """Send without waiting; False when the peer is gone or has stopped reading."""
        try:
            for part in parts[:-1]:
                self.raw.send(part, MORE_FOLLOWS)
            self.raw.send(parts[-1], DO_NOT_WAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        finally:
            if not self.raw.closed and int(self.raw.get(zmq.EVENTS)) & READABLE:
                self._loop.call_soon(self._drain)
        return True

    def close(self, linger_ms: int = 0) -> None:
        """Stop listening; what was not sent may still leave for that long, in ZMQ's own thread."""
        self._loop.remove_reader(self._descriptor)
        self.raw.close(linger_ms)

    def _drain(self) -> None:
        for _ in range(TURN):
            if self.raw.closed:
                return
            try:
                parts = self.raw.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_message(parts)
            except BaseException:
                self._loop.call_soon(self._drain)  # the rest still waits, and its edge is spent
                raise
        self._loop.call_soon(self._drain)
