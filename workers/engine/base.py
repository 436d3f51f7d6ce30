"""What the request plane needs of an engine; `vllm_engine` and `echo` provide it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(slots=True)
class Piece:
    """What one engine step added to one stream.

    `finish` is set on the last piece: stop, length, or repetition. `transfer` is set there by a prefill leg.
    """

    ids: Sequence[int]
    text: str
    finish: str | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    transfer: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One leg of a request in the engine's terms: a prompt of token ids and vLLM's sampling parameters."""

    request_id: str
    prompt: list[int]
    sampling: dict[str, Any]
    prefill_only: bool = False
    transfer: dict[str, Any] | None = None
    priority: int = 0


@dataclass(slots=True)
class Load:
    """How busy an engine is; `progress` grows with every step that had output."""

    progress: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a frontend must know of an engine. `lease_s` is how long a prefill's blocks are kept for its decode."""

    max_model_len: int
    block_size: int
    lease_s: float
    version: str


class RefusedError(Exception):
    """The engine will not serve this request, whoever asks; the message is for the client."""


class LostError(Exception):
    """The engine could not serve this request, but another might."""


class Engine(Protocol):
    """An engine that is up. `generate` raises RefusedError or LostError; leaving its iterator aborts the request."""

    sizes: Sizes
    load: Load
    operable: Operable
    adapter_uses: Counter[str]
    """Requests that run on each adapter now."""

    def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Serve one leg; the last piece has `finish` set."""
        ...

    async def release(self, request_id: str, transfer: dict[str, Any]) -> None:
        """On a decode engine: free what a prefill engine holds for a decode that will not come."""
        ...

    def dead(self) -> str | None:
        """Why the engine can serve nothing any more, or None while it can."""
        ...

    def shutdown(self, timeout_s: float) -> None:
        """End the engine and everything it started; blocks."""
        ...


@dataclass(slots=True)
class Sampling:
    """Defaults that a model brings along (generation_config.json), under what the client sent."""

    defaults: dict[str, Any] = field(default_factory=dict)

    def merged(self, sent: dict[str, Any]) -> dict[str, Any]:
        """The parameters to use."""
        return self.defaults | sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter as an engine is given it; `ident` is positive and tells it from the others that are loaded."""

    name: str
    ident: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """What LoRA adapters an engine takes.

    `loaded` at once, of a rank up to `rank`. `models` are the names that the base model goes by. `modules` are the sizes
    (in, out) of the layers that an adapter may change, None where unknown; with `complete` there are no others.
    """

    loaded: int
    rank: int
    models: tuple[str, ...]
    layers: int
    modules: Mapping[str, tuple[int | None, int | None]]
    complete: bool


class Operable(Protocol):
    """What operations on a live worker need of its engine. Each returns once it is done, and raises whatever the engine does.

    `refusals` are the operations, by name, that this engine can never do, with the reason and the advice.
    """

    refusals: Mapping[str, str]
    limits: AdapterLimits | None

    async def sleep(self, level: int) -> None:
        """Give up the KV cache and, at level 2, the weights; the engine has nothing to do by then."""
        ...

    async def wake(self) -> Sequence[str]:
        """Take them back, and go on; harmless when awake. Returns the adapters that were lost meanwhile."""
        ...

    async def pause(self) -> None:
        """Begin no further engine step."""
        ...

    async def resume(self) -> None:
        """Go on; harmless when not paused."""
        ...

    async def clear_cache(self) -> bool:
        """Forget the prefix cache; False, and nothing is done, while any of its blocks is in use."""
        ...

    async def add_adapter(self, adapter: Adapter) -> None:
        """Load an adapter that was checked.

        Raises:
            RefusedError: The engine does not want it, and is as it was.
        """
        ...

    async def remove_adapter(self, name: str) -> None:
        """Unload an adapter that no request uses; harmless when it is not loaded."""
        ...

    async def start_profile(self, prefix: str | None) -> str:
        """Begin to record; returns the folder that the traces will be in."""
        ...

    async def stop_profile(self) -> None:
        """End recording, and write the traces."""
        ...

    async def scale_ep(self, size: int) -> None:
        """Change the data-parallel size of an expert-parallel engine."""
        ...
