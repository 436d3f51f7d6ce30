"""What the request plane needs of an engine; `vllm_engine` and `echo` provide it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from workers.engine.metrics import EngineStats


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
    dp_rank: int | None = None


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
    stats: dict[int, EngineStats]
    """Of each data-parallel rank that this worker reaches, by its global number."""

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
