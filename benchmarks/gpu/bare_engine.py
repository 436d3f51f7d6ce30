"""A plain vLLM engine behind a socket, as bare as it gets: what Baton is compared with.

    python -m benchmarks.gpu.bare_engine ARGUMENTS.json PORT

Every request is one JSON object on a line: `{"op": "generate", "prompt": [ids], "sampling": {...}, "transfer": {...}}` is
answered by one line for each engine step, `{"n": tokens, "text": ...}`, and a last one with `"done": true` and, of a prefill,
`"transfer"`. `{"op": "metrics"}` is answered by vLLM's own counters, a JSON string. It detokenizes, as a server has to.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve one engine until SIGTERM."""
    from workers.engine import orphans

    orphans.die_with(os.getpid())
    llm = build(json.loads(Path(sys.argv[1]).read_text()))
    try:
        asyncio.run(serve(llm, int(sys.argv[2])))
    finally:
        llm.shutdown(timeout=5)


def build(arguments: dict[str, Any]) -> Any:
    """The engine, up and ready. `log_stats` among the arguments turns vLLM's counters on."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    log_stats = arguments.pop("log_stats", False)
    if "kv_transfer_config" in arguments:
        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
    if config.device_config.device_type == "cpu":  # as Baton does it (workers.engine.vllm_engine)
        from workers.engine import cpu

        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        if config.kv_transfer_config is not None:
            cpu.calm_nixl()
    return AsyncLLM.from_vllm_config(
        config, usage_context=UsageContext.OPENAI_API_SERVER, disable_log_stats=not log_stats
    )


async def serve(llm: Any, port: int) -> None:
    """Answer on the port until SIGTERM; the word `ready` on standard output says that it does."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    numbers = itertools.count()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(message: Any) -> None:
            writer.write(json.dumps(message).encode() + b"\n")

        try:
            request = json.loads(await reader.readline())
            if request["op"] == "metrics":
                from prometheus_client import generate_latest

                say(generate_latest().decode())
            else:
                await generate(llm, request, f"bare-{next(numbers)}", say)
            await writer.drain()
        except Exception as error:  # noqa: BLE001 - whatever it is, the client must hear of it and not wait
            say({"done": True, "error": f"{type(error).__name__}: {error}"})
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port, limit=1 << 26)
    async with server:
        print("ready", flush=True)
        await stop.wait()


async def generate(llm: Any, request: dict[str, Any], request_id: str, say: Any) -> None:
    """One leg: a line for each output, the last one with what a decode needs."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    transfer = request["transfer"]
    parameters = SamplingParams(
        **request["sampling"],
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": transfer} if transfer else None,
    )
    last: dict[str, Any] = {"done": True}
    async for output in llm.generate({"prompt_token_ids": request["prompt"]}, parameters, request_id):
        choice = output.outputs[0]
        if choice.finish_reason in ("abort", "error"):
            last["error"] = f"the engine ended the request with {choice.finish_reason!r}"
        if output.kv_transfer_params:
            last["transfer"] = output.kv_transfer_params
        if choice.token_ids:
            say({"n": len(choice.token_ids), "text": choice.text})
    say(last)


if __name__ == "__main__":
    main()
