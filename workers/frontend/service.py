"""What routes answer from: a model, its tokenizer, its workers, and what is counted of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launch.recipe import Kind, Tokenize
from launch.records import STOPPING
from workers.frontend.admission import Gate
from workers.frontend.errors import ApiError
from workers.frontend.exchange import Pool
from workers.frontend.metrics import ModelMetrics
from workers.frontend.openai import ChatRequest
from workers.frontend.sources import has_media, source
from workers.frontend.text import Text
from workers.runtime.wire import pack

TOKENIZE_IN_THREAD_CHARS = 4096
MAX_ID = 2**31 - 1  # what travels; the engine knows its vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model of the deployment."""

    name: str
    max_model_len: Callable[[], int]
    """Context length, as the workers say; 0 while none is there."""
    adapters: Callable[[], list[str]]
    """LoRA adapters that are loaded somewhere, each served as a model of its own."""
    created: int
    version: Callable[[], str] = lambda: ""
    """Version of the engines, as the workers say."""


@dataclass(slots=True)
class Service:
    """See above. `draining` is set once the deployment stops.

    Without a `local_text` workers make every prompt, else those that `tokenize` leaves to them.
    """

    served: Served
    local_text: Text | None
    pool: Pool
    metrics: ModelMetrics
    gate: Gate
    tokenize: Tokenize = Tokenize.AUTO
    one_of_several: bool = False
    """Whether the deployment serves other models too, so that what is said has to tell which is meant."""
    draining: bool = False
    moved: str | None = None
    """The URL that serves instead, once it is draining."""
    seconds_left: Callable[[], int | None] = lambda: None
    """Until Slurm ends the job; None where nothing is known of that."""

    def __post_init__(self) -> None:
        self.metrics.queued.set_function(lambda: self.gate.waiting)

    @property
    def text(self) -> Text:
        """The model's tokenizer and chat template.

        Raises:
            ApiError: 501, only the workers have them.
        """
        if self.local_text is None:
            raise ApiError(501, "this model's prompts are made by its workers, and this needs the frontend's tokenizer")
        return self.local_text

    def admit(self, model: str, generates: bool) -> None:
        """Refuse what cannot be answered now.

        Args:
            model: Name that the client gave: this model's, or that of one of its adapters.
            generates: Whether text is asked for, not vectors or scores.

        Raises:
            ApiError: 400 or 503.
        """
        if generates is self.pool.pooling:
            can = "computes embeddings and scores" if self.pool.pooling else "generates text"
            raise ApiError(400, f"the model {model!r} {can} and cannot answer this", "model")
        if self.draining:
            raise ApiError(503, self.reason([]), retry_after_s=5)
        if self.pool.unable:
            raise ApiError(503, self.reason(self.pool.unable), retry_after_s=1)
        self.gate.refuse_early()

    def context(self) -> int:
        """Context length of the model.

        Raises:
            ApiError: 503, no worker is there to say it.
        """
        length = self.served.max_model_len()
        if not length:
            raise ApiError(503, self.reason(self.pool.missing), retry_after_s=1)
        return length

    def adapter(self, model: str | None) -> str:
        """The LoRA adapter that a model's name stands for; "" for the model itself."""
        return "" if not model or model == self.served.name else model

    def reason(self, missing: list[Kind]) -> str:
        """Why something cannot be answered."""
        if self.draining:
            return f"{STOPPING}: {self.moved} serves instead" if self.moved else STOPPING
        whose = f" of the model {self.served.name!r}" if self.one_of_several else ""
        return f"no {' and no '.join(missing)} worker{whose} is ready"

    async def tokenized(self, size: int, work: Callable[[], bytes]) -> bytes:
        """Long texts are tokenized in a thread: the tokenizer lets go of the GIL, and other streams go on."""
        return work() if size < TOKENIZE_IN_THREAD_CHARS else await asyncio.to_thread(work)

    async def prompt(self, prompt: str | list[int], special: bool) -> bytes:
        """Packed token ids of a prompt that is text or token ids; none of a text whose ids a worker makes.

        Raises:
            ApiError: 400, it has ids that no token has.
        """
        text = self.local_text
        if isinstance(prompt, str):
            if text is None:
                return b""
            return await self.tokenized(len(prompt), lambda: text.encode(prompt, special))
        largest = text.vocabulary - 1 if text else MAX_ID
        if any(not 0 <= token <= largest for token in prompt):
            raise ApiError(400, f"prompt has token ids outside 0 to {largest}", param="prompt")
        return pack(prompt)

    async def conversation(self, ask: ChatRequest, sent: list[dict[str, Any]], size: int) -> tuple[bytes, bytes]:
        """The packed ids of a chat of about `size` bytes, or what a worker makes them of; the other is empty.

        A worker reads the messages as they were `sent`, the template as `ask` has them.
        """
        text = self.local_text
        if not ask.messages:
            raise ApiError(400, "messages must not be empty", param="messages")
        if text is None or (self.tokenize is Tokenize.AUTO and has_media(ask.messages)):
            return b"", source(messages=sent)
        return await self.tokenized(size, lambda: self.chat_ids(ask)), b""

    def chat_ids(self, ask: ChatRequest) -> bytes:
        """Packed token ids of a chat.

        Raises:
            ApiError: 501, only the workers can make them; or the template refuses it.
        """
        return self.text.chat(
            ask.messages, ask.template_variables, ask.tools, ask.continue_final_message, bool(ask.add_special_tokens)
        )
