"""From our engine arguments to vLLM's configuration, for the node that leads and for those that follow alike."""

from __future__ import annotations

import os
from typing import Any

from workers.engine import cpu

PORTS = ("master_port", "data_parallel_rpc_port")


def configuration(arguments: dict[str, Any], headless: bool = False) -> Any:
    """vLLM's VllmConfig. Call it before the event loop and any thread of ours starts: engine processes may be forked.

    Raises:
        ValueError: vLLM refused the arguments; it says why.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    config = AsyncEngineArgs(**_typed(arguments)).create_engine_config(
        UsageContext.OPENAI_API_SERVER, headless=headless
    )
    if config.device_config.device_type == "cpu":
        # Spawned, each engine process imports vLLM and torch again (10 s); the CPU platform sets this while the
        # configuration is made, so it can only be changed here. Nothing of ours has started a thread yet.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        import vllm.v1.worker.cpu_worker  # noqa: F401 - once, instead of in each process that is forked (0.35 s of CPU time)

        cpu.calm_queues()
        if config.kv_transfer_config is not None:
            cpu.calm_nixl()
    return config


def _typed(arguments: dict[str, Any]) -> dict[str, Any]:
    from vllm.config import KVEventsConfig, KVTransferConfig

    typed: dict[str, Any] = {name: int(arguments[name]) for name in PORTS if name in arguments}
    if isinstance(arguments.get("kv_transfer_config"), dict):
        typed["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    if isinstance(arguments.get("kv_events_config"), dict):
        typed["kv_events_config"] = KVEventsConfig(**arguments["kv_events_config"])
    return arguments | typed
