"""An engine that says the prompt again, token by token: what tests and benchmarks of everything else run on.

It is made for scale: one timer wakes all streams together, as a step of a real engine does, and a token's text is decoded
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import types
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from dataclasses import replace
from typing import Any

import msgspec

from workers.engine import transfer
from workers.engine.arguments import KV_LEASE_S
from workers.engine.base import Adapter, Ask, Load, Operable, Piece, RefusedError, Response, Sizes, UnbegunError
from workers.engine.echo_operations import EchoOperations
from workers.engine.metrics import EngineStats
from workers.runtime import speech

MAX_MODEL_LEN = 4096
BLOCK_SIZE = 32


class Steps:
    """Engine steps, `interval_s` apart while anybody waits for one; without an interval as fast as the loop turns.

    `on_step` is called at each, before the streams have what it made.
    """

    def __init__(self, interval_s: float, on_step: Callable[[], None]) -> None:
        self._loop: asyncio.AbstractEventLoop
        self._interval_s = interval_s
        self._on_step = on_step
        self._waiting: list[asyncio.Future[None]] = []
        self._under_way = False
        self._due = 0.0

    def next(self) -> Awaitable[None]:
        """To be awaited at once: the next step."""
        if not self._under_way:
            self._begin()
        if not self._interval_s:
            return _turn()
        future = self._loop.create_future()
        self._waiting.append(future)
        return future

    def _begin(self) -> None:
        self._under_way = True
        self._loop = loop = asyncio.get_running_loop()
        if not self._interval_s:
            loop.call_soon(self._step)
            return
        # One interval after the last step, or after now when the engine was idle.
        now = loop.time()
        self._due = (self._due if now < self._due + self._interval_s else now) + self._interval_s
        loop.call_at(self._due, self._step)

    def _step(self) -> None:
        self._under_way = False
        self._on_step()
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


@types.coroutine
def _turn() -> Generator[None, None, None]:
    """Let the loop turn once. This is what `asyncio.sleep(0)` waits for, without its own cost."""
    yield


class EchoEngine:
    """Answers a prompt with its own tokens, over and over, `interval_s` apart; `min_tokens` and stops are not its thing.

    With `slots`, so many requests run at once and the others wait, as in an engine with `max_num_seqs`.
    """

    def __init__(self, tokenizer: Any, interval_s: float, slots: int = 0) -> None:
        self._tokenizer = tokenizer
        self._steps = Steps(interval_s, self._stepped)
        self._slots = asyncio.Semaphore(slots) if slots else None
        self._texts: dict[int, str] = {}
        self._id = secrets.token_hex(8)
        self.load = Load()
        self.stats = {0: EngineStats()}
        self.released: list[str] = []
        self.adapters: dict[str, Adapter] = {}
        self.adapter_uses: Counter[str] = Counter()
        self.operable: Operable = EchoOperations(self.adapters)
        self.sizes = Sizes(max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, lease_s=KV_LEASE_S, version="echo")

    async def rendered(self, ask: Ask) -> Ask:
        """The source itself, tokenized; see `base.Engine`."""
        return replace(ask, prompt=self._tokenizer.encode(ask.source.decode()).ids) if ask.source else ask

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Serve one leg; see `base.Engine`."""
        if not ask.prompt:
            raise RefusedError("The prompt is empty.")
        if ask.adapter and ask.adapter not in self.adapters:
            raise UnbegunError(f"the adapter {ask.adapter!r} is not loaded here")
        self.adapter_uses[ask.adapter] += 1
        try:
            if ask.encode_only:
                yield Piece(ids=(), text="", finish="length")
                return
            async with self._slot():
                if ask.prefill_only:
                    passed, now = self._transfer(ask), time.monotonic()
                    yield Piece(ids=ask.prompt[:1], text="", finish="length", transfer=passed, made_at=now)
                    return
                if ask.transfer is not None:
                    transfer.unpack(ask.transfer, len(ask.prompt) + len(ask.produced), BLOCK_SIZE)
                room = MAX_MODEL_LEN - len(ask.prompt)
                count = room if ask.max_tokens < 0 else min(ask.max_tokens, room)
                # A unary choice is written whole by whoever ends it: what another worker said belongs to it.
                whole = ask.render.stream or ask.render.shape.whole
                earlier = "" if whole else "".join(map(self._text, ask.produced))
                prompt, begun, steps, text_of = ask.prompt, len(ask.produced), self._steps, self._text
                for produced in range(begun, count):
                    await steps.next()
                    token = prompt[produced % len(prompt)]
                    piece = Piece((token,), text_of(token), "length" if produced == count - 1 else None)
                    if produced == begun:
                        piece.text = earlier + piece.text
                        piece.before = [Piece(ids=(before,), text=text_of(before)) for before in ask.produced]
                    yield piece
        finally:
            self.adapter_uses[ask.adapter] -= 1

    async def call(
        self, request_id: str, route: str, body: bytes, say: Callable[[bytes], None] = lambda data: None
    ) -> Response:
        """The body, said again; of a recording, its size."""
        if route not in ("transcriptions", "translations"):
            return Response(200, body)
        recording = speech.decode(body)
        text = f"{len(recording.file)} bytes of {recording.filename}"
        if not recording.stream:
            return Response(200, msgspec.json.encode({"text": text}))
        for word in text.split():
            say(b'data: {"choices":[{"delta":{"content":"%b "}}]}\n\n' % word.encode())
            await self._steps.next()
        say(b"data: [DONE]\n\n")
        return Response(200, b"", "text/event-stream")

    async def release(self, request_id: str, transfer: dict[str, Any]) -> None:
        """Nothing is held; remembered for whoever asks."""
        self.released.append(request_id)

    def dead(self) -> str | None:
        """An echo does not die."""
        return None

    def shutdown(self, timeout_s: float) -> None:
        """Nothing to end."""

    def _stepped(self) -> None:
        self.load.progress += 1
        self.stats[0].record(None, None)

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A place among those that run; counted as waiting until there is one."""
        self.load.waiting += 1
        try:
            if self._slots is not None:
                await self._slots.acquire()
        finally:
            self.load.waiting -= 1
        self.load.running += 1
        try:
            yield
        finally:
            self.load.running -= 1
            if self._slots is not None:
                self._slots.release()

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return text

    def _transfer(self, ask: Ask) -> dict[str, Any]:
        """What vLLM's NixlConnector returns from a prefill, in shape."""
        tokens = len(ask.prompt) + len(ask.produced)
        blocks = -(-tokens // BLOCK_SIZE)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(range(blocks))],
            "remote_engine_id": self._id,
            "remote_request_id": ask.request_id,
            "remote_host": "echo",
            "remote_port": 1,
            "tp_size": 1,
            "remote_num_tokens": tokens,
            "transfer_mode": "pull",
        }
