"""What the request plane needs of an engine; `vllm_engine` and `echo` provide it."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

if TYPE_CHECKING:
    from workers.engine.metrics import EngineStats

from workers.runtime.wire import Render

NO_MEMBERS = b'"logprobs":null'


class Piece(msgspec.Struct, gc=False):  # made for every token: a struct of msgspec costs a third of a dataclass
    """What one engine step added to one stream.

    `finish` is set on the last piece: stop, length, tool_calls, or repetition. `transfer` is set there by a prefill leg, and
    `made_at` says when its engine was done with it, by the monotonic clock of the node: the lease runs from then on, and not
    from when somebody reads this.
    """

    ids: Sequence[int]
    text: str
    finish: str | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    transfer: dict[str, Any] | None = None
    made_at: float = 0.0
    message: bytes | None = None
    """JSON of a chat's delta (or, at the end of a unary answer, of its message) where that is more than the text; b"" when
    this step has nothing to say to the client."""
    members: bytes = NO_MEMBERS
    """Further JSON members of the choice."""
    extra: bytes = b""
    """JSON members for the top of the answer, each led by a comma: on the first piece of a stream, else on the last."""
    reasoning_tokens: int = -1
    """On the last piece: how many of the tokens were reasoning; -1 where nothing tells."""
    before: Sequence[Piece] = ()
    """On the first piece of an answer that another worker began: what that one has sent, token by token, for writers that
    remember."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One leg of a request in the engine's terms. `wire.Generate` says what the fields mean.

    `inputs` is the prompt as the engine takes it, where that is more than its ids: with media. `Engine.rendered` makes it.
    """

    request_id: str
    prompt: list[int]
    render: Render
    produced: list[int] = field(default_factory=list)
    options: bytes = b"{}"
    max_tokens: int = -1
    prefill_only: bool = False
    encode_only: bool = False
    transfer: bytes | None = None
    priority: int = 0
    adapter: str = ""
    dp_rank: int = -1
    choice: int = 0
    trace: Mapping[str, str] | None = None
    source: bytes = b""
    features: bytes = b""
    inputs: Any = None


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to a call that is answered whole."""

    status: int
    body: bytes
    content_type: str = "application/json"
    prompt_tokens: int = 0


@dataclass(slots=True)
class Load:
    """How busy an engine is; `progress` grows with every step that had output."""

    progress: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a frontend must know of an engine. `lease_s` is how long a prefill's blocks are kept for its decode, `kv_blocks`
    how many blocks one data-parallel rank has room for; 0 if unknown."""

    max_model_len: int
    block_size: int
    lease_s: float
    version: str
    tasks: tuple[str, ...] = ("generate",)
    kv_blocks: int = 0


class RefusedError(Exception):
    """The engine will not serve this request, whoever asks; the message is for the client.

    Attributes:
        status: HTTP status for the client.
        param: Name of the field that is at fault, where there is one.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class LostError(Exception):
    """The engine could not serve this request, but another might."""


class UnbegunError(LostError):
    """The engine did not even begin: what a prefill engine holds for this request is still held."""


class PeerLostError(LostError):
    """The engine that holds the prompt's KV cache cannot be reached from here; others may still reach it."""


class Engine(Protocol):
    """An engine that is up. `generate` and `call` raise RefusedError or LostError; leaving the iterator aborts."""

    sizes: Sizes
    load: Load
    stats: dict[int, EngineStats]
    """Of each data-parallel rank that this worker reaches, by its global number."""
    operable: Operable
    adapter_uses: Counter[str]
    """Requests that run on each adapter now."""

    async def rendered(self, ask: Ask) -> Ask:
        """The same leg with the prompt that its `source` stands for; with `features` where another leg is to follow."""
        ...

    def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """Serve one leg, rendered where it was to be; the last piece has `finish` set."""
        ...

    async def call(
        self, request_id: str, route: str, body: bytes, say: Callable[[bytes], None] = lambda data: None
    ) -> Response:
        """Answer a request on one of vLLM's routes for pooling models, or for recordings; the latter may stream, by `say`."""
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
