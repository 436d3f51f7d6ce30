"""What engines on the CPU need that engines on GPUs do not: machines with few cores and nothing to spin on."""

from __future__ import annotations

import os
import time
from typing import Any

PROGRESS_POLL_US = 1000
# A reader of vLLM's queues looks every LOOK_MS for LOOK_S after a message, then waits to be told.
LOOK_MS = 1
LOOK_S = 0.05


def calm_nixl() -> None:
    """Let NIXL's progress thread sleep up to 1 ms in its poll instead of not at all.

    NIXL 1.5.1's Python API sets the delay to 0, so each agent keeps a core busy from its start (measured: 99 % of one core
    in an idle engine, three quarters of it in system calls). Beside a GPU nobody misses that core; two engines on a laptop
    starve each other. A message still wakes the thread at once; the delay only bounds the wait for what UCX cannot signal.

    Call it before vLLM imports NIXL, in the process that the engine core is forked from.
    """
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")  # vLLM sets it, but only before NIXL's first import
    from nixl import _api

    binding: Any = _api.nixlBind
    compiled: Any = binding.nixlAgentConfig

    class CalmAgentConfig(compiled):  # type: ignore[misc]  # known at run time only
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, PROGRESS_POLL_US if name == "pthrDelay" and not value else value)

    binding.nixlAgentConfig = CalmAgentConfig


def calm_queues() -> None:
    """Let an engine core and its workers sleep between messages, instead of yielding in a loop for a second after each.

    vLLM 0.32 reads its shared-memory queues so, and a prefill engine that holds blocks for a decode engine sends a message
    each millisecond: its workers then yield without pause until the lease ends. On Linux 6.18 two such processes keep all
    others off their core (measured: decode workers that were runnable for 11 s and ran for 1 ms, and the kernel's own
    threads likewise), so that the decode engine whose pull would end it does not run. That was the first pull that hung for
    as long as a KV lease, between engines of two ranks each on two cores.

    The writer's word that there is something to read is lost when it follows the last one within some 1 ms: the word goes
    through a ZMQ socket with room for one, which looks for room as rarely as that. So a reader looks for itself at first.

    Call it in the process that the engine's processes are forked from.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    module: Any = shm_broadcast
    spinning: Any = module.SpinCondition

    class CalmSpinCondition(spinning):  # type: ignore[misc]  # known at run time only
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{"busy_loop_s": 0.0, **options})

        def wait(self, timeout_ms: int | None = None) -> None:
            if time.monotonic() - self.last_read < LOOK_S:
                timeout_ms = LOOK_MS if timeout_ms is None else min(LOOK_MS, timeout_ms)
            super().wait(timeout_ms)

    module.SpinCondition = CalmSpinCondition
