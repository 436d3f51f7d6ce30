"""Anthropic's messages: read as a chat, answered by a worker as a message.

What is accepted and what it means follows https://docs.anthropic.com/en/api/messages and vLLM 0.32's own server.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from workers.frontend.errors import ApiError
from workers.frontend.generation import answer_whole, chat_of
from workers.frontend.http import Request
from workers.frontend.models import Models
from workers.frontend.openai import Positive, Word, chat_from, parse
from workers.frontend.reply import Reply, told
from workers.frontend.text import Text
from workers.runtime.wire import Shape

MAX_STOPS = 64
# The client's tooling puts one before the system prompt; it is new with every request, and no prefix would be found again.
BILLING = "x-anthropic-billing-header"
EFFORTS = ("low", "medium", "high", "xhigh", "max")
# Under the same name and with the same meaning in a chat.
SAME = (
    "temperature",
    "top_k",
    "top_p",
    "cache_salt",
    "vllm_xargs",
    "watermarking",
    "kv_transfer_params",
    "ec_transfer_params",
)


class Block(msgspec.Struct, kw_only=True):
    """A part of a message; which members it has depends on its type."""

    type: Literal["text", "image", "tool_use", "tool_result", "tool_reference", "thinking", "redacted_thinking"]
    text: str | None = None
    source: dict[str, Any] | None = None
    id: str | None = None
    tool_use_id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    content: str | list[dict[str, Any]] | None = None
    thinking: str | None = None


class Turn(msgspec.Struct, kw_only=True):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Format(msgspec.Struct, kw_only=True):
    """The form of the answer: JSON of a schema."""

    type: Literal["json_schema"] = "json_schema"
    schema: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct, kw_only=True):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model reasons first; `budget_tokens` goes with "enabled"."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, msgspec.Meta(ge=1024, le=2**62)] | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessageRequest(CountRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Positive
    stream: bool | None = False
    stop_sequences: Annotated[list[str], msgspec.Meta(max_length=MAX_STOPS)] | None = None
    temperature: float | None = None
    top_k: Word | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ApiError: 400.
        """
        budget = self.thinking.budget_tokens if self.thinking and self.thinking.type == "enabled" else None
        if budget is not None and budget >= self.max_tokens:
            raise ApiError(400, "thinking.budget_tokens must be less than max_tokens", "thinking")


class Messages:
    """The routes of this API."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._dialects = {service.served.name: Dialect.of(service.local_text) for service in models.services}

    async def create(self, request: Request, reply: Reply) -> None:
        """POST /v1/messages."""
        ask, fields = parse(request.body, MessageRequest)
        service = self._models.admit(ask, generates=True)
        ask.check()
        chat = as_chat(ask, self._dialects[service.served.name]) | {
            "stream": ask.stream,
            "max_tokens": ask.max_tokens,
            "stop": ask.stop_sequences,
            **{name: fields[name] for name in SAME if fields.get(name) is not None},
        }
        read, chat = chat_from(chat)
        generation = await chat_of(service, Shape.MESSAGE, read, chat, len(request.body))
        generation.check(service.context())
        model = msgspec.json.encode(ask.model).decode()
        head = f'{{"id":"{generation.id}","type":"message","role":"assistant","model":{model},'
        await answer_whole(service, generation, head, request, reply, error_event)

    async def count(self, request: Request, reply: Reply) -> None:
        """POST /v1/messages/count_tokens."""
        ask, _ = parse(request.body, CountRequest)
        service = self._models.admit(ask, generates=True)
        read, _ = chat_from(as_chat(ask, self._dialects[service.served.name]))
        ids = await service.tokenized(len(request.body), lambda: service.chat_ids(read))
        tokens = len(ids) // 4
        answer = {"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}
        reply.respond(200, msgspec.json.encode(answer), told(request))


def error_event(error: ApiError) -> bytes:
    """An error at the end of a stream."""
    return b"event: error\ndata: %b\n\n" % error.anthropic_body()


class Dialect(msgspec.Struct, frozen=True):
    """What a chat template makes of things that only this API has.

    `system_first` templates refuse instructions that come later. `no_effort` is the effort that stands for no reasoning:
    "none", or "low" where the template takes no notice of "none".
    """

    system_first: bool
    no_effort: str

    @classmethod
    def of(cls, text: Text | None) -> Dialect:
        """Find out by trying; without a template of our own, a worker's is taken to refuse the most."""
        if text is None:
            return cls(system_first=True, no_effort="low")
        turns = [{"role": role, "content": "t"} for role in ("system", "user", "system", "user")]
        none = _tried(text, [turns[1]], "none")
        heeded = none is not None and all(_tried(text, [turns[1]], effort) != none for effort in EFFORTS)
        return cls(system_first=_tried(text, turns) is None, no_effort="none" if heeded else "low")


def _tried(text: Text, messages: list[dict[str, Any]], effort: str | None = None) -> bytes | None:
    """Token ids of a conversation; None when the template refuses it."""
    variables = {"reasoning_effort": effort, "enable_thinking": effort != "none"} if effort else {}
    try:
        return text.chat(messages, variables)
    except ApiError:
        return None


def as_chat(ask: CountRequest, dialect: Dialect) -> dict[str, Any]:
    """The request's conversation and tools as a chat's fields."""
    messages: list[dict[str, Any]] = []
    leading = [_instructions(ask.system)]
    if dialect.system_first:
        leading += [_instructions(turn.content) for turn in ask.messages if turn.role == "system"]
    system = "".join(text for text in leading if text)
    if system:
        messages.append({"role": "system", "content": system})
    for turn in ask.messages:
        if turn.role == "system":
            text = "" if dialect.system_first else _instructions(turn.content)
            messages += [{"role": "system", "content": text}] if text else []
        elif isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        else:
            messages += _turn(turn.role, turn.content)
    fields: dict[str, Any] = {"model": ask.model, "messages": messages}
    if ask.chat_template_kwargs is not None:
        fields["chat_template_kwargs"] = ask.chat_template_kwargs
    return fields | _output(ask, dialect) | _tools(ask)


def _instructions(said: str | list[Block] | None) -> str:
    if said is None or isinstance(said, str):
        return "" if said is None or said.startswith(BILLING) else said
    texts = (block.text for block in said if block.type == "text" and block.text)
    return "".join(text for text in texts if not text.startswith(BILLING))


def _turn(role: str, blocks: list[Block]) -> list[dict[str, Any]]:
    """The messages that one turn is in a chat: results of tools come before what the user says to them."""
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for block in blocks:
        if block.type == "text" and block.text:
            parts.append({"type": "text", "text": block.text})
        elif block.type == "image" and block.source:
            parts.append(_image(block.source))
        elif block.type == "thinking" and block.thinking is not None:
            thoughts.append(block.thinking)
        elif block.type == "tool_use":
            arguments = msgspec.json.encode(block.input or {}).decode()
            function = {"name": block.name or "", "arguments": arguments}
            calls.append({"id": block.id or "", "type": "function", "function": function})
        elif block.type == "tool_result" and role == "user":
            results += _result(block)
        elif block.type == "tool_result":
            parts.append({"type": "text", "text": f"Tool result: {block.content or ''}"})
    message: dict[str, Any] = {"role": role}
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if parts:
        alone = len(parts) == 1 and parts[0]["type"] == "text"
        message["content"] = parts[0]["text"] if alone else parts
    return results if role == "user" and not parts else [*results, message]


def _result(block: Block) -> list[dict[str, Any]]:
    """What a tool has answered; images in it are said by the user, for a tool's message holds text alone."""
    items = block.content if isinstance(block.content, list) else []
    texts = [str(item.get("text", "")) for item in items if item.get("type") == "text"]
    images = [_image(item.get("source") or {}) for item in items if item.get("type") == "image"]
    text = block.content if isinstance(block.content, str) else "\n".join(texts)
    told_by_tool = [{"role": "tool", "tool_call_id": block.tool_use_id or "", "content": text}]
    return told_by_tool + ([{"role": "user", "content": images}] if images else [])


def _image(source: dict[str, Any]) -> dict[str, Any]:
    """An image as a chat has it."""
    url = source.get("url", "")
    if source.get("type") != "url":
        url = f"data:{source.get('media_type', 'image/jpeg')};base64,{source.get('data', '')}"
    return {"type": "image_url", "image_url": {"url": url}}


def _output(ask: CountRequest, dialect: Dialect) -> dict[str, Any]:
    """How the answer is to be, as a chat's fields."""
    fields: dict[str, Any] = {}
    wanted, thinking = ask.output_config, ask.thinking
    if wanted and wanted.format and wanted.format.schema:
        schema = {"name": "json_schema", "schema": wanted.format.schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if wanted and wanted.effort:
        fields["reasoning_effort"] = wanted.effort
    if thinking and thinking.type == "disabled":
        fields["reasoning_effort"] = dialect.no_effort
    elif thinking and thinking.type == "enabled":
        if thinking.budget_tokens is None:
            raise ApiError(400, "thinking.budget_tokens is missing", "thinking")
        fields["thinking_token_budget"] = thinking.budget_tokens
    return fields


def _tools(ask: CountRequest) -> dict[str, Any]:
    """Tools and the choice among them, as a chat's fields."""
    fields: dict[str, Any] = {}
    if ask.tool_choice is not None:
        fields["parallel_tool_calls"] = not ask.tool_choice.disable_parallel_tool_use
        if ask.tool_choice.type == "tool":
            if not ask.tool_choice.name:
                raise ApiError(400, "tool_choice.name is required when type is 'tool'", "tool_choice")
            fields["tool_choice"] = {"type": "function", "function": {"name": ask.tool_choice.name}}
        else:
            fields["tool_choice"] = {"any": "required"}.get(ask.tool_choice.type, ask.tool_choice.type)
    if ask.tools is not None:
        fields.setdefault("tool_choice", "auto")
        fields["tools"] = [_tool(tool) for tool in ask.tools]
    return fields


def _tool(tool: Tool) -> dict[str, Any]:
    schema = {**tool.input_schema}
    schema.setdefault("type", "object")
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": schema}
    more = {"strict": tool.strict, "defer_loading": tool.defer_loading}
    function |= {name: value for name, value in more.items() if value is not None}
    return {"type": "function", "function": function}
