"""An engine that says the prompt again, token by token: what tests and benchmarks of everything else run on."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from workers.engine import transfer
from workers.engine.arguments import KV_LEASE_S
from workers.engine.base import Adapter, Ask, Load, Operable, Piece, RefusedError, Response, Sizes, UnbegunError
from workers.engine.echo_operations import EchoOperations
from workers.engine.metrics import EngineStats

MAX_MODEL_LEN = 4096
BLOCK_SIZE = 32


class EchoEngine:
    """Answers a prompt with its own tokens, over and over, `interval_s` apart; `min_tokens` and stops are not its thing."""

    def __init__(self, tokenizer: Any, interval_s: float) -> None:
        self._tokenizer = tokenizer
        self._interval_s = interval_s
        self._id = secrets.token_hex(8)
        self.load = Load()
        self.stats = {0: EngineStats()}
        self.released: list[str] = []
        self.adapters: dict[str, Adapter] = {}
        self.adapter_uses: Counter[str] = Counter()
        self.operable: Operable = EchoOperations(self.adapters)
        self.sizes = Sizes(max_model_len=MAX_MODEL_LEN, block_size=BLOCK_SIZE, lease_s=KV_LEASE_S, version="echo")

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Serve one leg; see `base.Engine`."""
        if not ask.prompt:
            raise RefusedError("The prompt is empty.")
        if ask.adapter and ask.adapter not in self.adapters:
            raise UnbegunError(f"the adapter {ask.adapter!r} is not loaded here")
        self.load.running += 1
        self.adapter_uses[ask.adapter] += 1
        try:
            if ask.prefill_only:
                yield Piece(ids=ask.prompt[:1], text="", finish="length", transfer=self._transfer(ask))
                return
            if ask.transfer is not None:
                transfer.unpack(ask.transfer, len(ask.prompt) + len(ask.produced), BLOCK_SIZE)
            room = MAX_MODEL_LEN - len(ask.prompt)
            count = room if ask.max_tokens < 0 else min(ask.max_tokens, room)
            # A unary answer is written whole by whoever ends it: what another worker said belongs to it.
            earlier = "" if ask.render.stream else "".join(map(self._say, ask.produced))
            for produced in range(len(ask.produced), count):
                await asyncio.sleep(self._interval_s)
                token = ask.prompt[produced % len(ask.prompt)]
                self.load.progress += 1
                self.stats[0].record(None, None)
                text, earlier = earlier + self._say(token), ""
                yield Piece(ids=(token,), text=text, finish="length" if produced == count - 1 else None)
        finally:
            self.load.running -= 1
            self.adapter_uses[ask.adapter] -= 1

    async def call(self, request_id: str, route: str, body: bytes) -> Response:
        """The body, said again."""
        return Response(200, body)

    async def release(self, request_id: str, transfer: dict[str, Any]) -> None:
        """Nothing is held; remembered for whoever asks."""
        self.released.append(request_id)

    def dead(self) -> str | None:
        """An echo does not die."""
        return None

    def shutdown(self, timeout_s: float) -> None:
        """Nothing to end."""

    def _say(self, token: int) -> str:
        said: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return said

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
