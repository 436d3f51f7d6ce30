"""The routes: find the one that is meant, check the key, have it answered, and tell errors in the shape of its API."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from functools import partial
from typing import Any

from workers.frontend import chats, speech, tokens
from workers.frontend.about import About
from workers.frontend.admin import Admin
from workers.frontend.batches import Batches, BatchRequest
from workers.frontend.bodies import unpacked
from workers.frontend.errors import ApiError
from workers.frontend.files import UPLOAD, Files
from workers.frontend.http import Request
from workers.frontend.keys import authorize, authorize_any
from workers.frontend.messages import CountRequest, MessageRequest, Messages
from workers.frontend.metrics import Metrics
from workers.frontend.models import Models
from workers.frontend.openai import ChatRequest, CompletionRequest
from workers.frontend.openapi import document
from workers.frontend.reply import REQUEST_ID_HEADER, Reply, told
from workers.frontend.responses import ResponseRequest, Responses, TokensRequest
from workers.frontend.routes import Access, Route, Routes
from workers.frontend.stored import Store
from workers.frontend.trace import Tracer
from workers.runtime.keys import KeyRing, Scope

ANTHROPIC = "/v1/messages"


class App:
    """The handler of all requests."""

    def __init__(
        self,
        models: Models,
        metrics: Metrics,
        keys: KeyRing,
        store: Store,
        files: Files,
        batches: Batches,
        tracer: Tracer,
        max_body_bytes: int,
        open_metrics: bool = False,
    ) -> None:
        self.models = models
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._open_metrics = open_metrics
        self._metrics = metrics
        self._tracer = tracer
        self.admin: Admin | None = None
        about, messages, responses = About(models, metrics), Messages(models), Responses(models, store)
        self._routes = Routes(
            (
                *_generating(models, messages, responses),
                *_tools(models),
                *_filing(files, batches),
                *_telling(about, self._openapi),
            )
        )

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the deployment stops."""
        return self.models.draining

    async def __call__(self, request: Request, reply: Reply) -> None:
        """Answer one request."""
        status, label = 500, "other"
        given = request.headers.get(REQUEST_ID_HEADER)
        request.headers[REQUEST_ID_HEADER] = given or secrets.token_hex(16)
        self._metrics.active.inc()
        try:
            with self._tracer.span(request) as span:
                try:
                    if self.admin is not None and self.admin.owns(request.path):
                        await self.admin(request, reply)
                    else:
                        route, parameters = self._routes.find(request.method, request.path)
                        label = span.name = route.path
                        self._authorize(route, request)
                        if request.body:
                            await unpacked(request, self._max_body_bytes)
                        await route.handler(request, reply, *parameters)
                    status = reply.status
                except ApiError as error:
                    status = error.status
                    body = error.anthropic_body() if request.path.startswith(ANTHROPIC) else error.body()
                    reply.respond(status, body, told(request) + error.headers())
                except asyncio.CancelledError:
                    status = 499  # the client closed the connection; nobody reads this status but the metrics
                    self._metrics.disconnected.inc()
                    raise
                finally:
                    span.status = status
        finally:
            self._metrics.active.dec()
            self._metrics.requests.labels(label, str(status)).inc()

    def _authorize(self, route: Route, request: Request) -> None:
        if route.access is Access.OPEN or request.key_id:  # the work on batches has its own
            return
        if route.access is Access.API:
            authorize(self._keys, request, Scope.USER)
        elif not self._open_metrics:
            authorize_any(self._keys, request)

    async def _openapi(self, request: Request, reply: Reply) -> None:
        """GET /openapi.json."""
        reply.respond(200, document(self._routes.all), told(request))


def _generating(models: Models, messages: Messages, responses: Responses) -> Iterable[Route]:
    post: Any = partial(Route, method="POST")
    response = "/v1/responses/{response_id}"
    yield post(
        path="/v1/chat/completions",
        handler=partial(chats.chat, models),
        summary="Answer a conversation",
        body=ChatRequest,
        streams=True,
    )
    yield post(
        path="/v1/completions",
        handler=partial(chats.completion, models),
        summary="Go on with a text",
        body=CompletionRequest,
        streams=True,
    )
    yield post(
        path="/v1/responses",
        handler=responses.create,
        summary="Answer, in the form of OpenAI's responses",
        body=ResponseRequest,
        streams=True,
    )
    yield post(
        path="/v1/responses/input_tokens",
        handler=responses.count,
        summary="Count the tokens of what a response would be asked",
        body=TokensRequest,
    )
    yield Route(method="GET", path=response, handler=responses.get, summary="A stored response")
    yield Route(method="DELETE", path=response, handler=responses.delete, summary="Forget a stored response")
    yield Route(
        method="GET",
        path=f"{response}/input_items",
        handler=responses.input_items,
        summary="What a stored response was asked",
    )
    yield post(path=f"{response}/cancel", handler=responses.cancel, summary="Refused: nothing runs in the background")
    yield post(
        path=ANTHROPIC,
        handler=messages.create,
        summary="Answer, in the form of Anthropic's messages",
        body=MessageRequest,
        streams=True,
        anthropic=True,
    )
    yield post(
        path=f"{ANTHROPIC}/count_tokens",
        handler=messages.count,
        summary="Count the tokens of a conversation",
        body=CountRequest,
        anthropic=True,
    )


def _tools(models: Models) -> Iterable[Route]:
    post: Any = partial(Route, method="POST")
    for path, name in chats.POOLING_ROUTES.items():
        handler = partial(chats.pooling, models)
        yield post(path=path, handler=handler, summary=f"vLLM's {name}", body=chats.PoolingRequest)
    for path, name in speech.SPEECH_ROUTES.items():
        yield post(
            path=path,
            handler=partial(speech.listen, models),
            summary=f"vLLM's {name} of a recording",
            form=speech.FIELDS,
            streams=True,
        )
    yield post(
        path="/tokenize",
        handler=partial(tokens.tokenize, models),
        summary="Token ids of a text or a conversation",
        body=tokens.TokenizeRequest,
    )
    yield post(
        path="/detokenize",
        handler=partial(tokens.detokenize, models),
        summary="The text of token ids",
        body=tokens.DetokenizeRequest,
    )


def _filing(files: Files, batches: Batches) -> Iterable[Route]:
    file, batch = "/v1/files/{file_id}", "/v1/batches/{batch_id}"
    yield Route(method="POST", path="/v1/files", handler=files.upload, summary="Upload a file", form=UPLOAD)
    yield Route(
        method="GET",
        path="/v1/files",
        handler=files.listing,
        summary="All files, the newest first",
        query=("purpose", "limit", "after", "order"),
    )
    yield Route(method="GET", path=file, handler=files.get, summary="What a file is")
    yield Route(method="DELETE", path=file, handler=files.delete, summary="Delete a file")
    yield Route(
        method="GET",
        path=f"{file}/content",
        handler=files.content,
        summary="What is in a file",
        content="application/octet-stream",
    )
    yield Route(
        method="POST",
        path="/v1/batches",
        handler=batches.create,
        summary="Have the requests of a file answered when there is room",
        body=BatchRequest,
    )
    yield Route(
        method="GET",
        path="/v1/batches",
        handler=batches.listing,
        summary="All batches, the newest first",
        query=("limit", "after"),
    )
    yield Route(method="GET", path=batch, handler=batches.get, summary="How far a batch is")
    yield Route(method="POST", path=f"{batch}/cancel", handler=batches.cancel, summary="End a batch early")


def _telling(about: About, openapi: Any) -> Iterable[Route]:
    get: Any = partial(Route, method="GET")
    yield get(path="/v1/models", handler=about.models, summary="The models that can be asked now")
    yield get(
        path="/v1/models/{model}/ready", handler=about.ready, summary="Whether it can be asked, and what is missing"
    )
    yield get(path="/v1/models/{model}", handler=about.model, summary="One model")
    yield get(
        path="/version", handler=about.version, summary="Versions of Baton and of its engines", access=Access.OPEN
    )
    yield get(path="/openapi.json", handler=openapi, summary="This document", access=Access.OPEN)
    yield get(path="/health", handler=about.health, summary="Whether requests can be answered", access=Access.OPEN)
    yield get(path="/ping", handler=about.health, summary="The same, as hosting services ask", access=Access.OPEN)
    yield Route(method="POST", path="/ping", handler=about.health, summary="The same", access=Access.OPEN)
    yield get(path="/live", handler=about.live, summary="Whether this process lives", access=Access.OPEN)
    yield get(path="/metrics", handler=about.metrics, summary="For Prometheus", access=Access.ANY, content="text/plain")
