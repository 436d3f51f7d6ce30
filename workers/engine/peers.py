"""Is the prefill engine there? Asked before a decode engine first turns to it.

One peer that does not answer blocks every other handshake of a decode engine for 5 s, one after the other (vLLM 0.32). So
a worker asks first, aside, with the very question that a handshake begins with, and remembers the answer for a while.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from workers.engine.base import LostError

ANSWER_S = 1.0
VALID_S = 30.0
# vLLM 0.32's first message of a handshake: (kind, pipeline rank, tensor rank). Rank 0 exists on every engine; one that does
# not exist would end the peer's listener thread.
QUESTION = msgspec.msgpack.encode((b"get_meta_msg", 0, 0))


class Peers:
    """The prefill engines that have answered lately."""

    def __init__(self) -> None:
        self._answered: dict[tuple[str, int], float] = {}
        self._asking: dict[tuple[str, int], asyncio.Task[bool]] = {}

    async def check(self, peer: tuple[str, int]) -> None:
        """Return if the peer answers, or did within the last `VALID_S`.

        Raises:
            LostError: It does not.
        """
        if time.monotonic() - self._answered.get(peer, -VALID_S) < VALID_S:
            return
        task = self._asking.get(peer)
        if task is None:
            task = self._asking[peer] = asyncio.create_task(_answers(peer), name=f"ask {peer[0]}:{peer[1]}")
            task.add_done_callback(lambda _: self._asking.pop(peer, None))
        if not await asyncio.shield(task):
            raise LostError(f"the prefill engine at {peer[0]}:{peer[1]} does not answer")
        self._answered[peer] = time.monotonic()


async def _answers(peer: tuple[str, int]) -> bool:
    context: Any = zmq.asyncio.Context.instance()
    socket = context.socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.connect(f"tcp://{peer[0]}:{peer[1]}")
        async with asyncio.timeout(ANSWER_S):
            await socket.send(QUESTION)
            await socket.recv_multipart()
    except (TimeoutError, zmq.ZMQError):
        return False
    else:
        return True
    finally:
        socket.close()
