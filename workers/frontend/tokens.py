"""Texts to token ids and back, as the model's tokenizer and chat template have it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from workers.frontend.errors import ApiError
from workers.frontend.http import Request
from workers.frontend.models import Models
from workers.frontend.openai import parse
from workers.frontend.reply import Reply, told
from workers.frontend.service import Service
from workers.runtime.wire import unpack


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: `prompt`, or `messages` with what goes with them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=2**62)]]
    model: str | None = None


async def tokenize(models: Models, request: Request, reply: Reply) -> None:
    """POST /tokenize."""
    ask, _ = parse(request.body, TokenizeRequest)
    service = models.find(ask.model)
    ids = unpack(await _tokenized(service, ask, len(request.body)))
    answer = {
        "count": len(ids),
        "max_model_len": service.context(),
        "tokens": ids,
        "token_strs": service.text.token_texts(ids) if ask.return_token_strs else None,
    }
    reply.respond(200, msgspec.json.encode(answer), told(request))


async def detokenize(models: Models, request: Request, reply: Reply) -> None:
    """POST /detokenize."""
    ask, _ = parse(request.body, DetokenizeRequest)
    service = models.find(ask.model)
    if any(token >= service.text.vocabulary for token in ask.tokens):
        raise ApiError(400, f"tokens has ids outside 0 to {service.text.vocabulary - 1}", "tokens")
    reply.respond(200, msgspec.json.encode({"prompt": service.text.decode(ask.tokens)}), told(request))


async def _tokenized(service: Service, ask: TokenizeRequest, size: int) -> bytes:
    text = service.text
    if ask.messages is None:
        if ask.prompt is None:
            raise ApiError(400, "prompt or messages is missing", "prompt")
        return await service.prompt(ask.prompt, ask.add_special_tokens is not False)
    messages = ask.messages
    if ask.chat_template is not None:
        raise ApiError(400, "a chat template of the client's own is not taken", "chat_template")
    if ask.continue_final_message and ask.add_generation_prompt:
        raise ApiError(400, "continue_final_message and add_generation_prompt cannot both be set")
    if ask.continue_final_message and not messages:
        raise ApiError(400, "messages must not be empty", "messages")
    variables = {"add_generation_prompt": ask.add_generation_prompt, **(ask.chat_template_kwargs or {})}

    def work() -> bytes:
        special = bool(ask.add_special_tokens)
        return text.chat(messages, variables, ask.tools, ask.continue_final_message, special)

    return await service.tokenized(size, work)
