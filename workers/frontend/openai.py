"""What clients may send (OpenAI's chat completions and completions, with vLLM's further parameters).

The frontend reads what it needs itself: the prompt, how many answers, how long, streamed or not. Everything else travels on
as it came, and the worker reads it with vLLM's own request classes: they know every parameter, its range and its meaning.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from workers.frontend.errors import ApiError
from workers.frontend.sources import spoken

T = TypeVar("T", bound=msgspec.Struct)

MAX_CHOICES = 64
# What travels in a message; how much of it a parameter may use is the engine's to check.
Word = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
# Dealt with here, or meaningless to a worker.
OWN = frozenset(
    (
        *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
        *("user", "metadata", "store", "service_tier", "request_id", "priority", "best_of", "suffix"),
    )
)
# vLLM's server can do these and we cannot yet: an answer without the asked-for property is a wrong answer.
UNSERVED = ("use_beam_search", "suffix", "truncate_prompt_tokens", "prompt_embeds", "documents", "return_prompt_text")


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options`."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Common(msgspec.Struct, kw_only=True):
    """What both APIs take and the frontend reads."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Word | None | msgspec.UnsetType = msgspec.UNSET
    n: int | None = None
    seed: Word | None = None
    priority: Word | None = 0
    echo: bool | None = False
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: Any = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes as events."""
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event says the usage so far."""
        return (
            self.include_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )

    @property
    def limit(self) -> int:
        """Tokens that each answer may have; -1 for as many as fit."""
        return self.max_tokens if isinstance(self.max_tokens, int) else -1

    @property
    def reads_prompt(self) -> bool:
        """Whether something is asked about the prompt's own tokens, which only the engine that computes it can tell."""
        return self.prompt_logprobs is not None

    def refuse(self, fields: dict[str, Any]) -> None:
        """Refuse what cannot be served.

        Raises:
            ApiError: 400, naming the field.
        """
        for name in UNSERVED:
            if fields.get(name):
                raise ApiError(400, f"{name} is not supported", param=name)
        if not 1 <= (1 if self.n is None else self.n) <= MAX_CHOICES:
            raise ApiError(400, f"n must be between 1 and {MAX_CHOICES}, got {self.n}", param="n")
        if self.limit < (0 if self.echo else 1) and self.limit != -1 or (self.max_tokens == -1):
            raise ApiError(400, f"max_tokens must be at least 1, got {self.max_tokens}", param="max_tokens")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream=true", param="stream_options")


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Word | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def check(self, fields: dict[str, Any]) -> None:
        """Refuse what cannot be served.

        Raises:
            ApiError: 400, naming the field.
        """
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.chat_template is not None:
            raise ApiError(400, "a chat template of the client's own is not taken", param="chat_template")
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400,
                "continue_final_message does not go with add_generation_prompt: set add_generation_prompt=false",
                param="continue_final_message",
            )
        self.refuse(fields)

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template may use beside the messages, as vLLM 0.32 puts it together."""
        effort = self.reasoning_effort
        more = {"add_generation_prompt": self.add_generation_prompt, "reasoning_effort": effort}
        given = self.chat_template_kwargs or {}
        if effort is not None and "enable_thinking" not in given:
            more["enable_thinking"] = effort != "none"
        return given | {name: value for name, value in more.items() if value is not None}


class CompletionRequest(Common, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    best_of: int | None = None
    logprobs: int | None = None

    def check(self, fields: dict[str, Any]) -> None:
        """Refuse what cannot be served.

        Raises:
            ApiError: 400, naming the field.
        """
        if self.max_tokens is msgspec.UNSET:
            self.max_tokens = COMPLETION_MAX_TOKENS
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of is not supported", param="best_of")
        self.refuse(fields)
        if not self.prompt:
            raise ApiError(400, "prompt must not be empty", param="prompt")

    @property
    def reads_prompt(self) -> bool:
        """Whether something is asked about the prompt's own tokens, which only the engine that computes it can tell."""
        return self.prompt_logprobs is not None or bool(self.echo and self.logprobs is not None)

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each text or token ids.

        Raises:
            ApiError: 400, the list mixes kinds.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        for kind in (list[str], list[list[int]], list[int]):
            try:
                found: list[Any] = msgspec.convert(self.prompt, kind)
            except msgspec.ValidationError:
                continue
            return [found] if kind == list[int] else found
        raise ApiError(
            400,
            "prompt must be a string, a list of strings, a list of token ids, or a list of such lists",
            param="prompt",
        )


def chat_from(fields: dict[str, Any]) -> tuple[ChatRequest, dict[str, Any]]:
    """A chat that another API's request was put into: what the frontend reads of it, checked, and all its fields.

    Raises:
        ApiError: 400.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        ask = msgspec.convert(fields, type=ChatRequest)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error)) from error
    ask.check(fields)
    return ask, fields


COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions


def parse(body: bytes, kind: type[T]) -> tuple[T, dict[str, Any]]:
    """Read a request body: what the frontend needs of it, and all its fields.

    Raises:
        ApiError: 400, saying where the body is wrong.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        return msgspec.convert(fields, type=kind), fields
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        param = where.rstrip("`").lstrip(".") or None
        raise ApiError(400, f"{message}{f' at {param}' if param else ''}", param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


def options(fields: dict[str, Any], chat: bool = True) -> bytes:
    """What travels on to the worker; only of a chat is it known what `messages` are.

    Raises:
        ApiError: 400, a number is too large for any parameter.
    """
    passed = {name: value for name, value in fields.items() if name not in OWN}
    if chat and fields.get("tools"):
        passed["messages"] = spoken(
            fields["messages"]
        )  # some parsers number tool calls on from those of the conversation
    try:
        return msgspec.json.encode(passed)
    except (OverflowError, UnicodeEncodeError) as error:
        raise ApiError(400, f"the request has a value beyond all bounds: {error}") from error
