"""What clients may send (OpenAI's chat completions and completions, with vLLM's further sampling parameters).

Unknown fields are ignored, as OpenAI's and vLLM's servers do. Known fields that are not served yet are refused rather than
ignored: an answer without the asked-for property is a wrong answer.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from workers.frontend.errors import ApiError

T = TypeVar("T")

# Sent to the engine under the same name when the client gives them; the engine checks their ranges.
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "bad_words",
)
MAX_CHOICES = 64
# What travels in a message; how much of it a parameter may use is the engine's to check.
Word = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]


class StreamOptions(msgspec.Struct, kw_only=True):
    """`stream_options`."""

    include_usage: bool = False


class Common(msgspec.Struct, kw_only=True):
    """What both APIs take."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Word | None = None
    min_p: float | None = None
    seed: Word | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Word] | None = None
    min_tokens: Word | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    priority: Word = 0
    logit_bias: dict[str, float] | None = None

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that the client gave."""
        given = ((name, getattr(self, name)) for name in SAMPLING)
        return {name: value for name, value in given if value is not None}

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def refuse_unserved(self, names: tuple[str, ...]) -> None:
        """Refuse the fields of those names when they are given.

        Raises:
            ApiError: 400, naming the field.
        """
        for name in names:
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported yet", param=name)
        if not 1 <= (1 if self.n is None else self.n) <= MAX_CHOICES:
            raise ApiError(400, f"n must be between 1 and {MAX_CHOICES}, got {self.n}", param="n")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ApiError(400, f"max_tokens must be at least 1, got {self.max_tokens}", param="max_tokens")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream=true", param="stream_options")


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse what cannot be served.

        Raises:
            ApiError: 400, naming the field.
        """
        if self.response_format == {"type": "text"}:
            self.response_format = None
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        self.refuse_unserved(("logprobs", "tools", "response_format", "logit_bias"))


class CompletionRequest(Common, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[Any]
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None
    logprobs: int | None = None

    def check(self) -> None:
        """Refuse what cannot be served.

        Raises:
            ApiError: 400, naming the field.
        """
        if self.best_of == (self.n or 1):
            self.best_of = None
        self.refuse_unserved(("echo", "suffix", "best_of", "logit_bias"))
        if self.logprobs is not None:
            raise ApiError(400, "logprobs is not supported yet", param="logprobs")
        if not self.prompt:
            raise ApiError(400, "prompt must not be empty", param="prompt")

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


def parse(body: bytes, kind: type[T]) -> T:
    """Read a request body.

    Raises:
        ApiError: 400, saying where the body is wrong.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        param = where.rstrip("`").lstrip(".") or None
        raise ApiError(400, f"{message}{f' at {param}' if param else ''}", param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
