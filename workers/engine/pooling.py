"""Embeddings, classification, scores and the other answers of pooling models, by vLLM's own request handlers (0.32).

A pooling request is answered whole, and its cost is the model's: so its body goes to a worker as the client wrote it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import TypeAdapter
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.classify.protocol import ClassificationRequest
from vllm.entrypoints.pooling.classify.serving import ServingClassification
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.entrypoints.pooling.embed.serving import ServingEmbedding
from vllm.entrypoints.pooling.pooling.protocol import PoolingRequest
from vllm.entrypoints.pooling.pooling.serving import ServingPooling
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
from vllm.entrypoints.pooling.scoring.serving import ServingScores
from vllm.entrypoints.pooling.utils import enable_scoring_api
from vllm.renderers.chat_utils import ChatTemplateConfig
from vllm.v1.engine.exceptions import EngineDeadError

from workers.engine.base import LostError, RefusedError, Response
from workers.engine.vllm_request import refusing

EMBED, CLASSIFY, POOL, SCORE, RERANK = "embeddings", "classify", "pooling", "score", "rerank"


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    total_tokens: int = 0


class _Counted(msgspec.Struct):
    usage: _Usage | None = None


class Pooling:
    """The handlers of what the model can do, by route."""

    def __init__(self, handlers: dict[str, tuple[Any, Any]]) -> None:
        self._handlers = handlers

    @classmethod
    async def of(cls, llm: Any, served_name: str, adapters: dict[str, Any], chat_template: str | None) -> Pooling:
        """For a running AsyncLLM; `adapters` is kept, not copied."""
        tasks = await llm.get_supported_tasks()
        config = llm.model_config
        models = OpenAIServingModels(llm, [BaseModelPath(name=served_name, model_path=config.model)])
        models.lora_requests = adapters
        common: dict[str, Any] = {
            "request_logger": None,
            "chat_template_config": ChatTemplateConfig(
                chat_template=chat_template,
                chat_template_content_format="auto",
                trust_request_chat_template=False,
                trust_request_mm_kwargs=False,
            ),
        }
        handlers: dict[str, tuple[Any, Any]] = {}
        task = config.get_pooling_task(tasks)
        if task is not None:
            handlers[POOL] = (PoolingRequest, ServingPooling(llm, models, supported_tasks=tasks, **common))
        if task == "embed":
            handlers[EMBED] = (EmbeddingRequest, ServingEmbedding(llm, models, **common))
        if task == "classify":
            handlers[CLASSIFY] = (ClassificationRequest, ServingClassification(llm, models, **common))
        if enable_scoring_api(tasks, config):
            scores = ServingScores(llm, models, supported_tasks=tasks, enable_flash_late_interaction=True, **common)
            handlers[SCORE], handlers[RERANK] = (ScoreRequest, scores), (RerankRequest, scores)
        return cls(handlers)

    async def call(self, route: str, body: bytes) -> Response:
        """Answer a request.

        Raises:
            RefusedError: The model cannot do this, or the body is wrong.
            LostError: The engine is dead.
        """
        if route not in self._handlers:
            can = ", ".join(sorted(self._handlers)) or "nothing of the kind"
            raise RefusedError(f"this model does not support {route}; it can do {can}", status=404)
        kind, handler = self._handlers[route]
        try:
            with refusing():
                response = await handler(_parsed(kind, body), None)
        except EngineDeadError as error:
            raise LostError("the engine has died") from error
        content = await _content(response)
        kind_of = response.headers.get("content-type", "application/json")
        return Response(response.status_code, content, kind_of, _tokens(content) if "json" in kind_of else 0)


def _parsed(kind: Any, body: bytes) -> Any:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(f"the body is not valid JSON: {error}") from error
    # A route may take one of several classes of request (a text, token ids, a conversation): a union of them.
    return TypeAdapter(kind).validate_python(found)


async def _content(response: Any) -> bytes:
    if hasattr(response, "body"):
        return bytes(response.body)
    parts = [part if isinstance(part, bytes) else part.encode() async for part in response.body_iterator]
    return b"".join(parts)


def _tokens(content: bytes) -> int:
    """Prompt tokens that the answer says it took."""
    try:
        usage = msgspec.json.decode(content, type=_Counted).usage
    except msgspec.DecodeError:
        return 0
    return (usage.prompt_tokens or usage.total_tokens) if usage else 0
