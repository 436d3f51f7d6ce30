"""Can the prefill engine be reached? Asked before a decode engine first turns to it, and while a pull takes long.

One peer that does not answer blocks every other handshake of a decode engine for 5 s, one after the other, and a pull over
a path that swallows everything never ends (vLLM 0.32). So a worker asks aside, with the very question that a handshake
begins with, over the same path.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any, NoReturn, TypeVar

import msgspec
import zmq
import zmq.asyncio

from workers.engine.base import PeerLostError
from workers.runtime.awake import AwakeClock

ANSWER_S = 1.0
VALID_S = 30.0
SILENT_S = 5.0
# vLLM 0.32's first message of a handshake: (kind, pipeline rank, tensor rank). Rank 0 exists on every engine; one that does
# not exist would end the peer's listener thread.
QUESTION = msgspec.msgpack.encode((b"get_meta_msg", 0, 0))

Address = tuple[str, int]
T = TypeVar("T")


class Peers:
    """The prefill engines that have answered lately; one that is pulled from may be silent for `silent_s`."""

    def __init__(self, silent_s: float = SILENT_S) -> None:
        self._silent_s = silent_s
        self._answered: dict[Address, float] = {}
        self._asking: dict[Address, asyncio.Task[bool]] = {}

    async def check(self, peer: Address) -> None:
        """Return if the peer answers, or did within the last `VALID_S`.

        Raises:
            PeerLostError: It does not.
        """
        if not await self._answers(peer, VALID_S):
            raise PeerLostError(f"the prefill engine at {peer[0]}:{peer[1]} does not answer")

    def forget(self, peer: Address) -> None:
        """Ask again before the next pull: this one went wrong."""
        self._answered.pop(peer, None)

    async def pulled(self, peer: Address, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The stream of a request that begins with a pull. Its first item shows that the pull is done; until then, from
        `ANSWER_S` on, the peer is asked now and then.

        Raises:
            PeerLostError: The peer has been silent for `silent_s`, and the stream was cancelled.
        """
        first = asyncio.create_task(_next(stream))
        silence: asyncio.Task[NoReturn] | None = None
        try:
            await asyncio.wait({first}, timeout=ANSWER_S)
            if not first.done():
                silence = asyncio.create_task(self._silence(peer), name=f"watch {peer[0]}:{peer[1]}")
                await asyncio.wait({first, silence}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done() and silence is not None:
                silence.result()
        finally:
            await _ended(first, silence)
        try:
            yield first.result()
        except StopAsyncIteration:
            return
        async for item in stream:
            yield item

    async def _silence(self, peer: Address) -> NoReturn:
        """Ask the peer until it has not answered for too long. Time that this process itself was held up does not count."""
        clock = AwakeClock()
        heard = clock.now
        while clock.now - heard < self._silent_s:
            answers = await self._answers(peer, ANSWER_S)
            clock.tick()
            if answers:
                heard = clock.now
            await asyncio.sleep(ANSWER_S / 2)
            clock.tick()
        self.forget(peer)
        raise PeerLostError(
            f"the prefill engine at {peer[0]}:{peer[1]} has not answered for {self._silent_s:.0f} s of a pull"
        )

    async def _answers(self, peer: Address, valid_s: float) -> bool:
        """Whether the peer answers, or did within that time; however many want to know, it is asked once."""
        if time.monotonic() - self._answered.get(peer, -valid_s) < valid_s:
            return True
        task = self._asking.get(peer)
        if task is None:
            task = self._asking[peer] = asyncio.create_task(_ask(peer), name=f"ask {peer[0]}:{peer[1]}")
            task.add_done_callback(lambda _: self._asking.pop(peer, None))
        answers = await asyncio.shield(task)
        if answers:
            self._answered[peer] = time.monotonic()
        return answers


async def _next(stream: AsyncGenerator[T, None]) -> T:
    return await anext(stream)


async def _ended(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel what still runs, and wait for it; what it raises is nobody's any more."""
    for task in tasks:
        if task is not None and not task.cancelled():
            if task.done():
                task.exception()  # looked at, so that it is not told of as forgotten
                continue
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await task


async def _ask(peer: Address) -> bool:
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
