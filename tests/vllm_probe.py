"""`python -m tests.vllm_probe MODEL FOLDER`: operations on a real vLLM engine, told as JSON.

A process of its own, because vLLM forks its engine core from the process that builds it, which should have no threads yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from tests.adapters import SIZES, make_adapter
from tests.reference import CPU_ENV
from workers.engine import orphans
from workers.engine.base import Ask
from workers.engine.operations import Operations
from workers.engine.options import ServingOptions
from workers.engine.server import RequestServer
from workers.engine.vllm_engine import VllmEngine, start
from workers.engine.vllm_operations import refusals
from workers.runtime import wire
from workers.runtime.commands import OperationError

PROMPT = list(range(300, 400))
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 8,
}
BAD: dict[str, Callable[[Path], object]] = {
    "rank": lambda folder: make_adapter(folder, rank=16),
    "size": lambda folder: make_adapter(folder, sizes=SIZES | {"o_proj": (128, 128)}),
    "module": lambda folder: make_adapter(folder, modules=["w_proj"]),
    "layer": lambda folder: make_adapter(folder, layers=[40]),
    "dora": lambda folder: make_adapter(folder, config={"use_dora": True}),
    "empty": lambda folder: folder.mkdir(),
    "missing": lambda folder: None,
}


def main() -> None:
    """Print one JSON object, `{step: what it showed}`."""
    model, folder = sys.argv[1], Path(sys.argv[2])
    os.environ.update(CPU_ENV)
    orphans.die_with(os.getpid())
    profiler = {"profiler": "torch", "torch_profiler_dir": str(folder / "traces"), "ignore_frontend": True}
    engine = start(
        ARGUMENTS
        | {"model": model, "served_model_name": "tiny", "enable_lora": True, "max_loras": 3}
        | {"max_lora_rank": 8, "profiler_config": profiler},
        ServingOptions(),
    )
    try:
        shown = asyncio.run(_operate(engine, folder))
    finally:
        engine.shutdown(5)
    shown["refused by configuration"] = dict(refusals(_transfer_config(model)))
    shown["refused with one slot"] = dict(refusals(_config(model, enable_lora=True, max_loras=1)))
    print("\nPROBE " + json.dumps(shown))


async def _operate(engine: VllmEngine, folder: Path) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    published: list[tuple[str, ...]] = []

    async def publish(**fields: Any) -> None:
        published.append(fields["adapters"])

    server = RequestServer(engine, "probe", CollectorRegistry())
    operations = Operations(engine, server, publish, drain_s=5, lora_dirs=[str(folder / "lora")])
    loads = 0
    add_lora = engine._llm.add_lora

    async def counted(request: Any) -> bool:
        nonlocal loads
        loads += 1
        return bool(await add_lora(request))

    engine._llm.add_lora = counted

    async def do(operation: str, **given: Any) -> Any:
        try:
            return await operations.perform(operation, given)
        except OperationError as error:
            return {"status": error.status, "message": str(error)}

    async def text(adapter: str | None = None) -> list[int]:
        return await _generate(engine, adapter)

    one, two, three = (str(make_adapter(folder / "lora" / name, seed=n)) for n, name in enumerate("abc"))
    shown["base"] = await text()
    shown["bad"] = {}
    for name, make in BAD.items():
        make(folder / "lora" / name)
        shown["bad"][name] = await do("load_lora", name=name, path=str(folder / "lora" / name))
    shown["loads of bad ones"] = loads
    shown["base after bad ones"] = await text()
    shown["refused by vllm"] = await _refused_by_vllm(engine, folder)
    loads = 0
    shown["twenty"] = await asyncio.gather(*(do("load_lora", name="a", path=one) for _ in range(20)))
    shown["loads of twenty"] = loads
    shown["b"] = await do("load_lora", name="b", uri=f"file://{two}")
    shown["full"] = await do("load_lora", name="c", path=three)
    shown["texts"] = [await text("a"), await text("b"), await text("a"), await text()]
    shown["together"] = await asyncio.gather(text("a"), text("b"), text())
    shown["ids"] = sorted(await engine._llm.list_loras())
    shown["unload"] = await do("unload_lora", name="b")
    shown["ids after"] = sorted(await engine._llm.list_loras())
    shown["published"] = published[:]

    make_adapter(Path(one), seed=9)
    shown["same files"] = await text("a")
    await do("unload_lora", name="a")
    await do("load_lora", name="a", path=one)
    shown["new files"] = await text("a")
    await do("clear")
    shown["new files, cache cleared"] = await text("a")

    shown["clear"] = await do("clear")
    shown["clear while blocks are held"] = await _while_running(engine, lambda: do("clear"))
    shown["pause"] = await do("pause")
    shown["paused"] = await engine._llm.is_paused()
    shown["paused generates"] = await _finishes(text())
    shown["resume"] = [await do("resume"), await engine._llm.is_paused(), await text()]
    for level in (1, 2):
        slept = await do("sleep", level=level)
        told = [slept, await engine._llm.is_sleeping(), await do("clear"), await do("status")]
        woken = await do("wake")
        told += [woken, await engine._llm.is_sleeping(), server.serving, await text(), await text("a")]
        shown[f"sleep {level}"] = told
    await do("sleep", level=2)
    shutil.rmtree(one)
    shown["adapter lost"] = [await do("wake"), await do("list_lora"), await text()]
    shown["drain"] = [await do("drain"), server.serving, await do("serve"), server.serving]
    shown["profile"] = [await do("start_profile"), await do("start_profile"), await text(), await do("stop_profile")]
    shown["traces"] = sorted(path.name for path in (folder / "traces").rglob("*") if path.is_file())
    shown["scale"] = await do("scale_ep", size=2)
    shown["dead"] = engine.dead()
    return shown


async def _generate(engine: VllmEngine, adapter: str | None) -> list[int]:
    """Eight greedy tokens, of the base model or an adapter."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    parameters = SamplingParams(
        max_tokens=8, temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    request = engine.adapters[adapter] if adapter else None
    ids: list[int] = []
    name = f"probe-{os.urandom(4).hex()}"
    prompt: Any = {"prompt_token_ids": PROMPT}
    async for output in engine._llm.generate(prompt, parameters, name, lora_request=request):
        ids = list(output.outputs[0].token_ids)
    return ids


async def _refused_by_vllm(engine: VllmEngine, folder: Path) -> Any:
    """What is checked before vLLM sees an adapter is also survived when it does."""
    from workers.engine.base import Adapter, RefusedError

    told = []
    for number, name in enumerate(BAD, start=1):
        try:
            path = str(folder / "lora" / name)
            await engine.operable.add_adapter(Adapter(name=name, ident=number, path=path))
        except RefusedError as error:
            told.append(f"{name}: {error}"[:200])
        else:
            told.append(f"{name}: taken")
            await engine.operable.remove_adapter(name)
    return [told, sorted(await engine._llm.list_loras()), engine.dead()]


async def _while_running(engine: VllmEngine, work: Callable[[], Awaitable[Any]]) -> Any:
    """What comes of it while a request holds blocks."""
    ask = Ask(request_id="long", prompt=PROMPT, render=wire.NOTHING, options=b'{"ignore_eos":true}', max_tokens=400)
    stream = engine.generate(ask)
    await anext(stream)
    told = await work()
    await stream.aclose()  # type: ignore[attr-defined]  # a generator
    return told


async def _finishes(work: Any) -> bool:
    """Whether it is done within a moment."""
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait([task], timeout=0.5)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return bool(done)


def _transfer_config(model: str) -> Any:
    """The configuration of an engine that passes its KV cache on, with nothing else switched on."""
    from vllm.config import KVTransferConfig

    transfer = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_producer", kv_buffer_device="cpu")
    return _config(model, kv_transfer_config=transfer)


def _config(model: str, **more: Any) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return AsyncEngineArgs(**ARGUMENTS, model=model, **more).create_engine_config()


if __name__ == "__main__":
    main()
