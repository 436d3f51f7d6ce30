"""The echo engine's operations: everything that an operation changes is a field to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workers.engine.base import Adapter, AdapterLimits

HIDDEN = 256
LIMITS = AdapterLimits(
    loaded=2,
    rank=16,
    models=("echo",),
    layers=3,
    modules={"q_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, HIDDEN // 2), "o_proj": (HIDDEN, HIDDEN)},
    complete=True,
)


class EchoOperations:
    """Operations in memory. An engine that hands prompts on cannot sleep, as vLLM's cannot."""

    def __init__(self, adapters: dict[str, Adapter]) -> None:
        self.adapters = adapters
        self.refusals: Mapping[str, str] = {"scale_ep": "an echo engine has one size"}
        self.limits: AdapterLimits | None = LIMITS
        self.level = 0
        self.paused = False
        self.cleared = 0
        self.loads = 0
        self.profile = ""

    async def sleep(self, level: int) -> None:
        """See `base.Operable`."""
        self.level = level

    async def wake(self) -> Sequence[str]:
        """See `base.Operable`."""
        self.level = 0
        return ()

    async def pause(self) -> None:
        """See `base.Operable`."""
        self.paused = True

    async def resume(self) -> None:
        """See `base.Operable`."""
        self.paused = False

    async def clear_cache(self) -> bool:
        """See `base.Operable`."""
        self.cleared += 1
        return True

    async def add_adapter(self, adapter: Adapter) -> None:
        """See `base.Operable`."""
        self.loads += 1
        self.adapters[adapter.name] = adapter

    async def remove_adapter(self, name: str) -> None:
        """See `base.Operable`."""
        self.adapters.pop(name, None)

    async def start_profile(self, prefix: str | None) -> str:
        """See `base.Operable`."""
        self.profile = prefix or "echo"
        return "memory"

    async def stop_profile(self) -> None:
        """See `base.Operable`."""
        self.profile = ""

    async def scale_ep(self, size: int) -> None:
        """See `base.Operable`; refused before."""
