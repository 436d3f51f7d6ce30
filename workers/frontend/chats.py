"""Chats, completions, and the requests of pooling models."""

from __future__ import annotations

import msgspec

from launch.recipe import Kind
from workers.frontend.exchange import call
from workers.frontend.generation import Generation, answer_choices, chat_of
from workers.frontend.http import Request
from workers.frontend.models import Models
from workers.frontend.openai import ChatRequest, CompletionRequest, parse
from workers.frontend.reply import REQUEST_ID_HEADER, Reply, told
from workers.frontend.sources import CHARS_PER_TOKEN, source
from workers.frontend.wishes import wishes
from workers.runtime.wire import Shape

# vLLM's routes for pooling models, and the same under /v1 where vLLM has them elsewhere.
POOLING_ROUTES = {
    "/v1/embeddings": "embeddings",
    **dict.fromkeys(("/classify", "/v1/classify"), "classify"),
    **dict.fromkeys(("/pooling", "/v1/pooling"), "pooling"),
    **dict.fromkeys(("/score", "/v1/score"), "score"),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), "rerank"),
}


class PoolingRequest(msgspec.Struct):
    """What the frontend reads of a request to a pooling model; the name of the only one may be left out."""

    model: str | None = None


async def chat(models: Models, request: Request, reply: Reply) -> None:
    """POST /v1/chat/completions."""
    ask, fields = parse(request.body, ChatRequest)
    service = models.admit(ask, generates=True)
    ask.check(fields)
    last = ask.messages[-1] if ask.messages else {}
    spoken = last.get("content") if ask.echo and last.get("role") == "assistant" else None
    echo = spoken if isinstance(spoken, str) else None
    generation = await chat_of(service, Shape.CHAT, ask, fields, len(request.body), echo)
    await answer_choices(service, generation, request, reply)


async def completion(models: Models, request: Request, reply: Reply) -> None:
    """POST /v1/completions."""
    ask, fields = parse(request.body, CompletionRequest)
    service = models.admit(ask, generates=True)
    ask.check(fields)
    texts = ask.prompts()
    special = ask.add_special_tokens is not False
    prompts = [await service.prompt(prompt, special) for prompt in texts]
    echoes = [text if isinstance(text, str) else None for text in texts]
    by_worker = service.local_text is None
    made = [source(prompt=text) if by_worker and isinstance(text, str) else b"" for text in texts]
    await answer_choices(service, Generation(Shape.COMPLETION, ask, fields, prompts, echoes, made), request, reply)


async def pooling(models: Models, request: Request, reply: Reply) -> None:
    """Embeddings and the like: the body goes to a worker as it came."""
    ask, fields = parse(request.body, PoolingRequest)
    service = models.admit(ask, generates=False)
    route = POOLING_ROUTES[request.path]
    request_id, key = request.headers[REQUEST_ID_HEADER], request.key_id
    guess = len(request.body) // CHARS_PER_TOKEN
    header = told(request) + service.gate.charge(key, guess)
    await service.gate.turn(key, guess)
    with service.gate.passing():
        called = await call(
            service.pool,
            Kind.EMBEDDING,
            request_id,
            route,
            request.body,
            service.adapter(ask.model),
            wishes(request.headers, fields),
        )
    service.metrics.prompt_tokens.inc(called.prompt_tokens)
    reply.respond(called.status, called.body, header, called.content_type.encode())
