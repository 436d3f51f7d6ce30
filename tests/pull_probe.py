"""`python -m tests.pull_probe MODEL KIND ADDRESS`: a real prefill or decode engine on one side of a path that is cut.

It reads a JSON object a line from its standard input and writes one for each, led by `PROBE `: a process of its own, so that it
can live in a network namespace of its own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from typing import Any

from tests.reference import CPU_ENV
from tests.vllm_probe import ARGUMENTS
from workers.engine import orphans, transfer
from workers.engine.base import Ask, LostError
from workers.engine.options import ServingOptions
from workers.engine.vllm_engine import VllmEngine, start
from workers.runtime import wire

LEASE_S = 20
PORT = 5600
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
OPTIONS = b'{"temperature":0,"ignore_eos":true}'


def main() -> None:
    """Answer questions until the input ends."""
    model, kind, address = sys.argv[1:4]
    os.environ.update(CPU_ENV)
    os.environ["VLLM_HOST_IP"] = os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = address
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(PORT)
    orphans.die_with(os.getpid())
    moved = {
        "kv_connector": "NixlConnector",
        "kv_role": ROLES[kind],
        "kv_buffer_device": "cpu",
        "kv_connector_extra_config": {"kv_lease_duration": LEASE_S},
    }
    engine = start(ARGUMENTS | {"model": model, "kv_transfer_config": moved}, ServingOptions())
    try:
        asyncio.run(_answer(engine))
    finally:
        engine.shutdown(5)


async def _answer(engine: VllmEngine) -> None:
    _say({"ready": True})
    for number in range(1000):
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            return
        asked = json.loads(line)
        begun = time.monotonic()
        said: dict[str, Any] = {}
        try:
            async with asyncio.timeout(60):
                said = await _leg(engine, f"{asked['leg']}-{number}", asked)
        except (LostError, TimeoutError) as error:
            said = {"error": type(error).__name__, "message": str(error)}
        _say(said | {"seconds": time.monotonic() - begun})


async def _leg(engine: VllmEngine, name: str, asked: dict[str, Any]) -> dict[str, Any]:
    prefill = asked["leg"] == "prefill"
    passed = asked.get("transfer")
    ask = Ask(
        request_id=name,
        prompt=asked["prompt"],
        render=wire.NOTHING,
        options=OPTIONS,
        max_tokens=1 if prefill else 8,
        prefill_only=prefill,
        transfer=base64.b64decode(passed) if passed else None,
    )
    ids: list[int] = []
    packed = ""
    async for piece in engine.generate(ask):
        ids += piece.ids
        if prefill and piece.transfer:
            packed = base64.b64encode(transfer.pack(piece.transfer)).decode()
    return {"transfer": packed} if prefill else {"ids": ids}


def _say(what: dict[str, Any]) -> None:
    print("PROBE " + json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
