"""What engines on the CPU need that engines on GPUs do not: machines with few cores and nothing to spin on."""

from __future__ import annotations

import os
from typing import Any

PROGRESS_POLL_US = 1000


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
