"""vLLM's AsyncLLM (0.32) as an `Engine`. vLLM and torch are imported when an engine starts, not before."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from workers.engine.arguments import KV_LEASE_S
from workers.engine.base import Ask, Load, LostError, Piece, RefusedError, Sampling, Sizes
from workers.engine.configuration import configuration
from workers.engine.connectors import lease_s

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class VllmEngine:
    """A running AsyncLLM."""

    def __init__(self, llm: AsyncLLM, load: Load) -> None:
        from vllm import __version__

        config = llm.vllm_config
        self._llm = llm
        self._sampling = Sampling(config.model_config.get_diff_sampling_param())
        self.load = load
        self.sizes = Sizes(
            max_model_len=config.model_config.max_model_len,
            block_size=config.cache_config.block_size,
            lease_s=lease_s(
                dataclasses.asdict(transfer) if (transfer := config.kv_transfer_config) else None, KV_LEASE_S
            ),
            version=__version__,
        )

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Serve one leg; see `base.Engine`."""
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        sampling = self._sampling.merged(ask.sampling)
        transfer = ask.transfer
        if ask.prefill_only:
            transfer = PREFILL
            sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        try:
            parameters = SamplingParams(
                **sampling,
                output_kind=RequestOutputKind.DELTA,
                extra_args={"kv_transfer_params": transfer} if transfer else None,
            )
            stream = self._llm.generate(
                {"prompt_token_ids": ask.prompt}, parameters, ask.request_id, priority=ask.priority
            )
            async for output in stream:
                choice = output.outputs[0]
                if choice.finish_reason in ("abort", "error"):
                    raise LostError(f"the engine ended the request with {choice.finish_reason!r}")
                yield Piece(
                    ids=choice.token_ids,
                    text=choice.text,
                    finish=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    cached_tokens=output.num_cached_tokens or 0,
                    transfer=output.kv_transfer_params,
                )
        except (VLLMValidationError, ValueError, TypeError) as error:
            raise RefusedError(str(error)) from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise LostError(f"the engine failed: {type(error).__name__}") from error

    async def release(self, request_id: str, transfer: dict[str, Any]) -> None:
        """Free what a prefill engine holds for a decode that will not come."""
        await self._llm.notify_kv_transfer_request_rejected(request_id, transfer)

    def dead(self) -> str | None:
        """Why the engine can serve nothing any more."""
        return "vLLM's engine core has died" if self._llm.errored else None

    def shutdown(self, timeout_s: float) -> None:
        """End the engine core and its workers; blocks for `timeout_s` and a little more."""
        self._llm.shutdown(timeout=timeout_s)


def start(arguments: dict[str, Any]) -> VllmEngine:
    """Build the engine; blocks until it is ready. Call it before the event loop and any thread of ours starts.

    Raises:
        RuntimeError: The engine core did not come up; it logged why.
    """
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    load = Load()
    config = configuration(arguments)
    llm = AsyncLLM.from_vllm_config(
        config, usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=[_load_logger(load)], disable_log_stats=True
    )
    return VllmEngine(llm, load)


def _load_logger(load: Load) -> Any:
    """A stat logger that keeps `load` current; vLLM calls it after every step that had output, in our loop."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class LoadLogger(StatLoggerBase):  # type: ignore[misc]  # mypy does not follow vLLM here
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *unused: Any, **also_unused: Any) -> None:
            load.progress += 1
            if scheduler_stats is not None:
                load.running = scheduler_stats.num_running_reqs
                load.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
                load.kv_usage = scheduler_stats.kv_cache_usage

        def log_engine_initialized(self) -> None:
            pass

    return LoadLogger
