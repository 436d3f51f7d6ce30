"""vLLM's AsyncLLM (0.32) as an `Engine`. vLLM and torch are imported when an engine starts, not before."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from workers.engine import transfer
from workers.engine.arguments import KV_LEASE_S
from workers.engine.base import Ask, Load, LostError, Operable, Piece, RefusedError, Response, Sizes, UnbegunError
from workers.engine.configuration import configuration
from workers.engine.connectors import lease_s
from workers.engine.health import fallen_cores
from workers.engine.metrics import EngineStats, sum_up
from workers.engine.options import ServingOptions
from workers.engine.peers import Address, Peers
from workers.engine.vllm_operations import VllmOperations
from workers.runtime.collector import for_good

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class VllmEngine:
    """A running AsyncLLM.

    `adapters` are vLLM's LoRA requests by name, `adapter_uses` counts the requests that use each of them now.
    """

    def __init__(self, llm: AsyncLLM, load: Load, stats: dict[int, EngineStats], serving: ServingOptions) -> None:
        from vllm import __version__

        # Imported now: with the first request it would hold up the loop for seconds, and frontends would take us for dead.
        from workers.engine import pooling, speech, vllm_request
        from workers.engine.reader import Reader
        from workers.engine.rendering import Rendering

        self._requests, self._poolings, self._speeches = vllm_request, pooling, speech
        config = llm.vllm_config
        self._llm = llm
        self._serving = serving
        runner = config.model_config.runner_type
        self._reader = Reader.of(llm, serving) if runner == "generate" else None
        passed = config.kv_transfer_config
        paired = passed is not None and passed.kv_role in ("kv_producer", "kv_consumer")
        paired = paired or config.ec_transfer_config is not None
        self._rendering = Rendering(llm, serving, passes_on=paired) if runner == "generate" else None
        self._passes_on = paired
        self._pooling: Any = None
        self._speech: Any = None
        self._peers = Peers()
        parallel = config.parallel_config
        # Of an engine over several nodes AsyncLLM counts its own ranks from 0; the deployment counts all.
        self._dp_first = parallel.data_parallel_rank if parallel.local_engines_only else 0
        self._dp_count = parallel.data_parallel_size
        self.adapters: dict[str, Any] = {}
        self.adapter_uses: Counter[str] = Counter()
        self.load = load
        self.stats = stats
        self.operable: Operable = VllmOperations(llm, self.adapters)
        self.sizes = Sizes(
            max_model_len=config.model_config.max_model_len,
            block_size=config.cache_config.block_size,
            lease_s=lease_s(dataclasses.asdict(passed) if passed else None, KV_LEASE_S),
            version=__version__,
            tasks=(runner,),
            kv_blocks=(config.cache_config.num_gpu_blocks or 0) // max(parallel.data_parallel_size, 1),
        )

    async def rendered(self, ask: Ask) -> Ask:
        """The same leg with its prompt; see `base.Engine`."""
        return await self._rendering.rendered(ask) if self._rendering else ask

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Serve one leg; see `base.Engine`."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if self._reader is None:
            raise RefusedError("this model does not generate text")
        request = self._requests.VllmRequest(self._reader, ask)
        prompt: dict[str, Any] = {**(ask.inputs or {}), "prompt_token_ids": request.prompt}
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        sampling = request.sampling
        peer: Address | None = None
        if ask.prefill_only or ask.encode_only:
            sampling = _thrown_away({"kv_transfer_params": dict(PREFILL)} if ask.prefill_only else {})
        elif ask.transfer is not None:
            peer = transfer.peer(ask.transfer)
            await self._peers.check(peer)
            pull = transfer.unpack(ask.transfer, len(request.prompt), self.sizes.block_size)
            sampling.extra_args = {**(sampling.extra_args or {}), "kv_transfer_params": pull}
        with self._using(ask.adapter) as adapter, self._requests.refusing():
            try:
                stream = self._llm.generate(
                    prompt,
                    sampling,
                    ask.request_id,
                    lora_request=adapter,
                    priority=ask.priority,
                    data_parallel_rank=self._local_rank(ask.dp_rank),
                    trace_headers=ask.trace,
                    **({} if ask.prefill_only or ask.encode_only else request.for_engine()),
                )
                outputs = self._peers.pulled(peer, stream) if peer else stream
                async with contextlib.aclosing(stream), contextlib.aclosing(outputs):
                    async for output in outputs:
                        if output.outputs[0].finish_reason in ("abort", "error"):
                            if peer:
                                self._peers.forget(peer)
                            raise LostError(f"the engine ended the request with {output.outputs[0].finish_reason!r}")
                        early = ask.prefill_only or ask.encode_only
                        piece = _prefilled(output) if early else request.read(output)
                        if piece is not None:
                            yield piece
                            if piece.finish is not None:
                                return
            except (EngineDeadError, EngineGenerateError) as error:
                if isinstance(error.__cause__, VLLMClientError):
                    raise error.__cause__ from None
                raise LostError(f"the engine failed: {type(error).__name__}") from error

    async def call(
        self, request_id: str, route: str, body: bytes, say: Callable[[bytes], None] = lambda data: None
    ) -> Response:
        """Answer a request on one of vLLM's further routes; see `base.Engine`."""
        served = self._llm.model_config.served_model_name
        if route in self._speeches.ROUTES:
            if self._speech is None:
                self._speech = await self._speeches.Speech.of(self._llm, served, self.adapters, self._passes_on)
            said: Response = await self._speech.call(request_id, route, body, say)
            return said
        if self._pooling is None:
            self._pooling = await self._poolings.Pooling.of(
                self._llm, served, self.adapters, self._serving.chat_template
            )
        answered: Response = await self._pooling.call(route, body)
        return answered

    @contextlib.contextmanager
    def _using(self, name: str) -> Iterator[Any]:
        """The LoRA adapter of a request, counted while it is used; None for the model itself."""
        if not name:
            yield None
            return
        if name not in self.adapters:
            raise UnbegunError(f"the adapter {name!r} is not loaded here")
        self.adapter_uses[name] += 1
        try:
            yield self.adapters[name]
        finally:
            self.adapter_uses[name] -= 1

    def _local_rank(self, rank: int) -> int | None:
        """AsyncLLM's number of a data-parallel rank of the deployment; None lets it choose."""
        return rank - self._dp_first if rank >= 0 and self._dp_count > 1 else None

    async def release(self, request_id: str, transfer: dict[str, Any]) -> None:
        """Free what a prefill engine holds for a decode that will not come."""
        await self._llm.notify_kv_transfer_request_rejected(request_id, transfer)

    def dead(self) -> str | None:
        """Why the engine can serve nothing any more."""
        fallen = fallen_cores(self._llm)
        if fallen:
            return f"vLLM's engine core has died: {', '.join(fallen)}"
        return "vLLM's engine core has died" if self._llm.errored else None

    def shutdown(self, timeout_s: float) -> None:
        """End the engine core and its workers; blocks for `timeout_s` and a little more."""
        self._llm.shutdown(timeout=timeout_s)


def _thrown_away(extra: dict[str, Any]) -> Any:
    """A prefill's only token is thrown away: the decode engine samples it again, with the client's parameters."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra,
    )


def _prefilled(output: Any) -> Piece:
    choice = output.outputs[0]
    return Piece(
        choice.token_ids,
        "",
        choice.finish_reason,
        None,
        output.num_cached_tokens or 0,
        output.kv_transfer_params,
        made_at=output.metrics.last_token_ts,  # the engine core's monotonic clock, which is its node's
    )


def start(arguments: dict[str, Any], serving: ServingOptions) -> VllmEngine:
    """Build the engine; blocks until it is ready. Call it before the event loop and any thread of ours starts.

    Raises:
        RuntimeError: The engine core did not come up; it logged why.
    """
    with for_good():
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        # What `VllmEngine` needs too, while imports are cheap.
        from workers.engine import pooling, reader, rendering, vllm_request  # noqa: F401

        config = configuration(arguments)
    load, stats = Load(), dict[int, EngineStats]()
    loggers = [_load_logger(load, stats)]
    llm = AsyncLLM.from_vllm_config(
        config, usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=loggers, disable_log_stats=True
    )
    return VllmEngine(llm, load, stats, serving)


def _load_logger(load: Load, stats: dict[int, EngineStats]) -> Any:
    """A stat logger that keeps `load` and `stats` current; vLLM calls it after every step that had work, in our loop."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class LoadLogger(StatLoggerBase):  # type: ignore[misc]  # mypy does not follow vLLM here
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._rank = stats[engine_index] = EngineStats()

        def record(self, scheduler_stats: Any, iteration_stats: Any, *unused: Any, **also_unused: Any) -> None:
            self._rank.record(scheduler_stats, iteration_stats)
            sum_up(load, stats.values())

        def log_engine_initialized(self) -> None:
            pass

    return LoadLogger
