"""OpenAI's responses: read as a chat, answered by a worker as a response, kept for a next one to go on from.

What is accepted and what it means follows https://platform.openai.com/docs/api-reference/responses and vLLM 0.32's own
server. Tools that a server would run itself (web search, code) are left out, as there; what runs in the background, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from workers.frontend.errors import ApiError
from workers.frontend.generation import Generation, answer_whole, chat_of
from workers.frontend.http import Request
from workers.frontend.models import Models
from workers.frontend.openai import ChatRequest, Positive, Word, chat_from, parse
from workers.frontend.reply import Reply, told
from workers.frontend.stored import Store, Stored
from workers.runtime.wire import Shape

log = logging.getLogger(__name__)

LOGPROBS = "message.output_text.logprobs"
UNSERVED = ("prompt", "conversation", "previous_input_messages", "context_management")
# Under the same name and with the same meaning in a chat.
SAME = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "logit_bias", "skip_special_tokens", "include_stop_str_in_output"),
    *("structured_outputs", "cache_salt", "vllm_xargs", "chat_template_kwargs", "include_reasoning", "priority"),
    *("parallel_tool_calls", "stream", "watermarking", "kv_transfer_params", "ec_transfer_params", "min_tokens"),
    "add_special_tokens",
)


class Reasoning(msgspec.Struct, kw_only=True):
    """How hard the model is to think."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class Format(msgspec.Struct, kw_only=True):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    """How the answer's text is to be."""

    format: Format | None = None
    verbosity: str | None = None


class TokensRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses/input_tokens."""

    model: str | None = None
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"


class ResponseRequest(TokensRequest, kw_only=True):
    """POST /v1/responses."""

    input: str | list[Any]
    stream: bool | None = False
    store: bool | None = True
    background: bool | None = False
    include: list[str] | None = None
    max_output_tokens: Positive | None = None
    max_tool_calls: Word | None = None
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=16)] | None = None
    service_tier: str | None = "auto"
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = 0
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None

    @property
    def tells_logprobs(self) -> bool:
        """Whether the answer's logprobs are asked for."""
        return LOGPROBS in (self.include or ())


class Responses:
    """The routes of this API."""

    def __init__(self, models: Models, store: Store) -> None:
        self._models = models
        self._store = store

    async def create(self, request: Request, reply: Reply) -> None:
        """POST /v1/responses."""
        ask, fields = parse(request.body, ResponseRequest)
        service = self._models.admit(ask, generates=True)
        self._check(ask, fields)
        earlier = await self._earlier(ask.previous_response_id)
        read, chat = self._chat(ask, fields, earlier)
        generation = await chat_of(service, Shape.RESPONSE, read, chat, len(request.body))
        context = service.context()
        generation.check(context)
        room = context - len(generation.prompts[0]) // 4
        head = _head(ask, generation, min(ask.max_output_tokens or room, room))
        keep = self._keeper(generation, chat["messages"], ask) if ask.store is not False and self._store.keeps else None
        await answer_whole(service, generation, head, request, reply, error_event, keep)

    async def count(self, request: Request, reply: Reply) -> None:
        """POST /v1/responses/input_tokens."""
        ask, fields = parse(request.body, TokensRequest)
        service = self._models.admit(ask, generates=True)
        read, _ = self._chat(ask, fields, await self._earlier(ask.previous_response_id))
        ids = await service.tokenized(len(request.body), lambda: service.chat_ids(read))
        answer = {"object": "response.input_tokens", "input_tokens": len(ids) // 4}
        reply.respond(200, msgspec.json.encode(answer), told(request))

    async def get(self, request: Request, reply: Reply, name: str) -> None:
        """GET /v1/responses/{id}."""
        reply.respond(200, bytes((await self._known(name)).response), told(request))

    async def delete(self, request: Request, reply: Reply, name: str) -> None:
        """DELETE /v1/responses/{id}."""
        if not await asyncio.to_thread(self._store.drop, name):
            raise _unknown(name)
        reply.respond(200, msgspec.json.encode({"id": name, "object": "response", "deleted": True}), told(request))

    async def input_items(self, request: Request, reply: Reply, name: str) -> None:
        """GET /v1/responses/{id}/input_items."""
        items = (await self._known(name)).input
        ends = {"first_id": None, "last_id": None, "has_more": False}
        reply.respond(200, msgspec.json.encode({"object": "list", "data": items, **ends}), told(request))

    async def cancel(self, request: Request, reply: Reply, name: str) -> None:
        """POST /v1/responses/{id}/cancel."""
        await self._known(name)
        raise ApiError(400, "only responses in the background can be cancelled, and none is served there")

    def _check(self, ask: ResponseRequest, fields: dict[str, Any]) -> None:
        if ask.background:
            raise ApiError(400, "background is not supported: stream the response instead", "background")
        for name in UNSERVED:
            if fields.get(name):
                raise ApiError(400, f"{name} is not supported", name)

    def _chat(
        self, ask: TokensRequest, fields: dict[str, Any], earlier: list[dict[str, Any]]
    ) -> tuple[ChatRequest, dict[str, Any]]:
        """The request as a chat."""
        instructions = [{"role": "system", "content": ask.instructions}] if ask.instructions else []
        chat = {
            "model": ask.model,
            "messages": [*instructions, *as_messages(ask.input or [], list(earlier))],
            **{name: fields[name] for name in SAME if fields.get(name) is not None},
            **_tools(ask),
        }
        if ask.input is not None and _goes_on(ask.input):
            chat |= {"continue_final_message": True, "add_generation_prompt": False}
        if ask.reasoning and ask.reasoning.effort:
            chat["reasoning_effort"] = ask.reasoning.effort
        form = ask.text.format if ask.text else None
        if form and form.type != "text":
            if chat.get("structured_outputs"):
                raise ApiError(400, "structured_outputs and text.format cannot both be given", "structured_outputs")
            chat["response_format"] = _response_format(form)
        if isinstance(ask, ResponseRequest):
            chat["max_tokens"] = ask.max_output_tokens
            if ask.tells_logprobs:
                chat |= {"logprobs": True, "top_logprobs": ask.top_logprobs or 0}
        read, chat = chat_from(chat)
        read.messages = [_for_template(message) for message in read.messages]
        return read, chat

    async def _earlier(self, name: str | None) -> list[dict[str, Any]]:
        """The conversation that a request goes on from."""
        if name is None:
            return []
        stored = await self._known(name)
        output = msgspec.json.decode(stored.response)["output"]
        return as_messages(output, stored.messages)

    async def _known(self, name: str) -> Stored:
        stored = await asyncio.to_thread(self._store.get, name)
        if stored is None:
            raise _unknown(name)
        return stored

    def _keeper(
        self, generation: Generation, messages: list[dict[str, Any]], ask: ResponseRequest
    ) -> Callable[[bytes], None]:
        given = ask.input
        items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
        # Instructions do not carry over from one response to the next.
        said = [message for message in messages if message.get("role") != "system"]

        def keep(response: bytes) -> None:
            try:
                self._store.put(generation.id, Stored(response=msgspec.Raw(response), input=items, messages=said))
            except OSError as error:  # the answer itself is whole; who goes on from it is told that it is not there
                log.warning("response %s cannot be stored: %s", generation.id, error)

        return keep


def error_event(error: ApiError) -> bytes:
    """An error at the end of a stream: this API's event, with OpenAI's error object in it, which its clients raise."""
    body = msgspec.json.decode(error.body())
    event = {"type": "error", "code": str(error.status), "message": str(error), "param": error.param, **body}
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(event)


def as_messages(given: str | list[Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a chat, followed by what a request gives: text of the user, or items.

    What the assistant thought, said and called is several items and one message.

    Raises:
        ApiError: 400, an item is of no known kind.
    """
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    found = [dict(message) for message in messages]
    for number, item in enumerate(given):
        message = _message(item, f"input[{number}]")
        before = found[-1] if found and found[-1].get("role") == "assistant" else None
        if message["role"] != "assistant" or before is None or not _join(before, message):
            found.append(message)
    return found


def _message(item: Any, where: str) -> dict[str, Any]:
    """One item as a message of its own."""
    if not isinstance(item, dict):
        raise ApiError(400, f"{where} is no object", "input")
    kind = item.get("type", "message")
    if kind == "function_call":
        function = {"name": _text(item, "name", where), "arguments": _text(item, "arguments", where)}
        call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        return {
            "role": "tool",
            "tool_call_id": _text(item, "call_id", where),
            "content": _content(item.get("output"), where),
        }
    if kind == "reasoning":
        return {"role": "assistant", "reasoning": _thought(item, where)}
    if kind == "message" and isinstance(item.get("role"), str):
        content = _content(item.get("content"), where)
        if item["role"] == "assistant" and isinstance(content, list):
            content = content[0].get("text", "") if content else ""
        return {"role": item["role"], "content": content}
    raise ApiError(400, f"{where}: items of type {kind!r} are not supported", "input")


def _join(before: dict[str, Any], message: dict[str, Any]) -> bool:
    """Add to an assistant's message what it lacks; False when it has that already."""
    if "tool_calls" in message:
        before["tool_calls"] = [*(before.get("tool_calls") or ()), *message["tool_calls"]]
        return True
    name = "reasoning" if "reasoning" in message else "content"
    if before.get(name) is not None:
        return False
    before[name] = message[name]
    return True


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its calls' arguments as objects (`text._call` says why)."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _object(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _object(text: str) -> dict[str, Any]:
    """The object that is written in a text; an empty one where that is something else, as in vLLM's server."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError:
        return {}


def _text(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{where} has no {name}", "input")
    return value


def _thought(item: dict[str, Any], where: str) -> str:
    if item.get("encrypted_content"):
        raise ApiError(400, f"{where}: encrypted reasoning cannot be read", "input")
    for name in ("content", "summary"):
        parts = item.get(name)
        if isinstance(parts, list) and parts and isinstance(parts[0], dict):
            return _text(parts[0], "text", f"{where}.{name}[0]")
    return ""


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Text or parts, these as a chat has them."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ApiError(400, f"{where}: content is neither text nor a list of parts", "input")
    return [_part(part) for part in content]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"], "detail": part.get("detail", "auto")}}
    return part  # of a chat's own types; what is of none is refused with the rest of the chat


def _goes_on(given: str | list[Any]) -> bool:
    """Whether the last item is a part of the answer, to be gone on with."""
    last = given[-1] if isinstance(given, list) and given else None
    if not isinstance(last, dict) or last.get("type", "message") not in ("message", "reasoning"):
        return False
    return last.get("status") in ("in_progress", "incomplete")


def _tools(ask: TokensRequest) -> dict[str, Any]:
    """Functions and the choice among them, as a chat's fields."""
    tools = [_tool(tool, number) for number, tool in enumerate(ask.tools or ()) if _is_function(tool)]
    choice = ask.tool_choice
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    if not tools:
        if choice not in (None, "auto", "none"):
            raise ApiError(400, "tool_choice needs tools: give some functions", "tool_choice")
        return {}
    return {"tools": tools, "tool_choice": "auto" if choice is None else choice}


def _is_function(tool: dict[str, Any]) -> bool:
    if tool.get("type") in ("custom", "namespace"):
        raise ApiError(400, f"tools of type {tool['type']!r} are not supported: give functions", "tools")
    return tool.get("type") == "function"


def _tool(tool: dict[str, Any], number: int) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str):
        raise ApiError(400, f"tools[{number}] has no name", "tools")
    function = {name: tool.get(name) for name in ("name", "description", "parameters")}
    function |= {name: tool[name] for name in ("strict", "defer_loading") if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _response_format(form: Format) -> dict[str, Any]:
    if form.type == "json_object":
        return {"type": "json_object"}
    if form.schema is None:
        raise ApiError(400, "text.format needs a schema", "text")
    return {"type": "json_schema", "json_schema": {"name": form.name or "answer", "schema": form.schema}}


def _head(ask: ResponseRequest, generation: Generation, max_tokens: int) -> str:
    """The beginning of the response's JSON object: what it says of the request."""
    told_of = {
        "id": generation.id,
        "object": "response",
        "created_at": int(time.time()),
        "error": None,
        "model": ask.model,
        "background": False,
        "instructions": ask.instructions,
        "max_output_tokens": max_tokens,
        "max_tool_calls": ask.max_tool_calls,
        "metadata": ask.metadata,
        "parallel_tool_calls": ask.parallel_tool_calls is not False,
        "presence_penalty": ask.presence_penalty or 0.0,
        "frequency_penalty": ask.frequency_penalty or 0.0,
        "previous_response_id": ask.previous_response_id,
        "reasoning": ask.reasoning,
        "service_tier": ask.service_tier or "auto",
        "temperature": 1.0 if ask.temperature is None else ask.temperature,
        "text": ask.text,
        "tool_choice": ask.tool_choice or "auto" if ask.tools else "none",
        "tools": ask.tools or [],
        "top_logprobs": ask.top_logprobs if ask.tells_logprobs else None,
        "top_p": 1.0 if ask.top_p is None else ask.top_p,
        "truncation": ask.truncation or "disabled",
        "user": ask.user,
    }
    return msgspec.json.encode(told_of).decode()[:-1] + ","


def _unknown(name: str) -> ApiError:
    return ApiError(404, f"there is no response {name!r}: it was not stored, or is no longer", "previous_response_id")
