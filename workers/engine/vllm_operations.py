"""What vLLM's AsyncLLM (0.32) can do while it serves, as an `Operable`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.engine.base import Adapter, AdapterLimits, LostError, RefusedError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)

# Model types whose layers are exactly those of `_llama_modules`; of others only what all have in common is compared.
LLAMA_LIKE = frozenset(("llama", "mistral", "qwen2", "qwen3"))

PROFILER = "{profiler: torch, torch_profiler_dir: /a/folder, ignore_frontend: true}"


class VllmOperations:
    """Operations over an AsyncLLM. `adapters` is what its `generate` looks adapters up in."""

    def __init__(self, llm: AsyncLLM, adapters: dict[str, LoRARequest]) -> None:
        self._llm = llm
        self._adapters = adapters
        self._level = 0
        self.refusals = refusals(llm.vllm_config)
        self.limits = limits(llm.vllm_config)

    async def sleep(self, level: int) -> None:
        """See `base.Operable`; on the CPU vLLM flips its state and keeps the memory."""
        self._level = level
        await self._llm.sleep(level=level)

    async def wake(self) -> Sequence[str]:
        """See `base.Operable`. After level 2 the weights are read again, and with them vLLM drops all adapters."""
        if self._level < 2:
            await self._llm.wake_up()
            return ()
        if await self._llm.is_sleeping():
            await self._llm.wake_up(tags=["weights"])
            await self._llm.collective_rpc("reload_weights")
            await self._llm.wake_up(tags=["kv_cache"])
        lost = []
        for name, request in list(self._adapters.items()):
            try:
                await self._llm.add_lora(request)
            except Exception as error:  # noqa: BLE001  # the engine core's errors arrive as plain exceptions
                log.warning("adapter %s could not be loaded again: %s", name, error)
                del self._adapters[name]
                lost.append(name)
        self._level = 0
        return lost

    async def pause(self) -> None:
        """See `base.Operable`. Returns once vLLM has no work, and blocks that wait for a decode's pull count as work."""
        await self._llm.pause_generation(mode="keep", clear_cache=False)

    async def resume(self) -> None:
        """See `base.Operable`."""
        await self._llm.resume_generation()

    async def clear_cache(self) -> bool:
        """See `base.Operable`."""
        return bool(await self._llm.reset_prefix_cache())

    async def add_adapter(self, adapter: Adapter) -> None:
        """See `base.Operable`. Only what `add_lora` took may be named in a request: an unknown one ends the engine core."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(lora_name=adapter.name, lora_int_id=adapter.ident, lora_path=adapter.path)
        try:
            taken = await self._llm.add_lora(request)
        except Exception as error:  # the engine core's errors arrive as plain exceptions
            if self._llm.errored:
                raise LostError("the engine core died when it loaded the adapter") from error
            await self._llm.remove_lora(adapter.ident)  # it may have got as far as the list, without its weights
            raise RefusedError(str(error)) from error
        if not taken:
            raise RefusedError("vLLM did not take it")
        self._adapters[adapter.name] = request

    async def remove_adapter(self, name: str) -> None:
        """See `base.Operable`; first nobody can ask for it, then it goes."""
        request = self._adapters.pop(name, None)
        if request is None:
            return
        try:
            await self._llm.remove_lora(request.lora_int_id)
        except BaseException:
            self._adapters[name] = request
            raise

    async def start_profile(self, prefix: str | None) -> str:
        """See `base.Operable`."""
        await self._llm.start_profile(prefix)
        return str(self._llm.vllm_config.profiler_config.torch_profiler_dir)

    async def stop_profile(self) -> None:
        """See `base.Operable`."""
        await self._llm.stop_profile()

    async def scale_ep(self, size: int) -> None:
        """See `base.Operable`."""
        await self._llm.scale_elastic_ep(size)


def refusals(config: Any) -> Mapping[str, str]:
    """The operations that an engine of this configuration can never do, and why."""
    found = {}
    if config.kv_transfer_config is not None:
        found["sleep"] = (
            "this engine passes its KV cache to others, and vLLM 0.32 does not register that memory again after a wake: a "
            "pull would read what is there by then; `pause` (level 0) is safe, and keeps the memory"
        )
    elif config.device_config.device_type != "cpu" and not config.model_config.enable_sleep_mode:
        found["sleep"] = "the engine was started without it: launch with engine.args.enable_sleep_mode=true"
    if config.profiler_config is None or config.profiler_config.profiler is None:
        found["start_profile"] = found["stop_profile"] = (
            f"the engine was started without a profiler: launch with 'engine.args.profiler_config={PROFILER}'"
        )
    elif config.profiler_config.profiler == "torch" and not config.profiler_config.ignore_frontend:
        # Seen with vLLM 0.32 and torch 2.13: AsyncLLM starts and saves its trace in two different threads.
        found["start_profile"] = found["stop_profile"] = (
            "vLLM 0.32 would also record the process that serves requests, which does not survive it (a segmentation "
            f"fault): launch with 'engine.args.profiler_config={PROFILER}'"
        )
    parallel = config.parallel_config
    if not parallel.enable_elastic_ep or parallel.data_parallel_backend != "ray":
        found["scale_ep"] = (
            "vLLM 0.32 changes the size of an engine only with engine.args.enable_elastic_ep=true and its Ray backend "
            "(data_parallel_backend: ray), on GPUs, for mixture-of-experts models"
        )
    if config.lora_config is None:
        found["load_lora"] = found["unload_lora"] = (
            "the engine was started without LoRA: launch with engine.args.enable_lora=true, and max_lora_rank and "
            "max_cpu_loras as needed"
        )
    elif _room(config) < 1:
        found["load_lora"] = found["unload_lora"] = (
            "on the CPU vLLM 0.32 needs one more of engine.args.max_loras than there are adapters, "
            f"and it is {config.lora_config.max_loras}"
        )
    return found


def limits(config: Any) -> AdapterLimits | None:
    """What adapters an engine of this configuration takes."""
    lora = config.lora_config
    if lora is None:
        return None
    model = config.model_config
    text = model.hf_text_config
    served = model.served_model_name
    names = (served,) if isinstance(served, str) else tuple(served or ())
    complete = text.model_type in LLAMA_LIKE
    hidden = text.hidden_size
    return AdapterLimits(
        loaded=_room(config),
        rank=lora.max_lora_rank,
        models=(*names, Path(str(model.model)).name),
        layers=text.num_hidden_layers,
        modules=_llama_modules(text) if complete else {name: (hidden, None) for name in ("q_proj", "k_proj", "v_proj")},
        complete=complete,
    )


def _room(config: Any) -> int:
    """How many adapters may be loaded.

    On the CPU the last slot must stay empty: there vLLM 0.32 serves a request without an adapter, when it shares a step with
    one that has one, from slot -1, which is the last (vllm/lora/ops/torch_ops/lora_ops.py indexes with it).
    """
    lora = config.lora_config
    most = int(lora.max_cpu_loras or lora.max_loras)
    return min(most, lora.max_loras - 1) if config.device_config.device_type == "cpu" else most


def _llama_modules(text: Any) -> dict[str, tuple[int, int]]:
    """Sizes (in, out) of the layers of a model of Llama's shape."""
    hidden, inner = text.hidden_size, text.intermediate_size
    head = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    heads, pairs = text.num_attention_heads * head, text.num_key_value_heads * head
    return {
        "q_proj": (hidden, heads),
        "k_proj": (hidden, pairs),
        "v_proj": (hidden, pairs),
        "o_proj": (heads, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
