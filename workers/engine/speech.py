"""Transcriptions and translations of recordings, by vLLM's own request handlers (0.32).

A recording is decoded, cut into pieces that the model takes, and answered by the worker that gets it: nothing of it is
passed on to another engine.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.requests import Request
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.speech_to_text.base.utils import read_upload_with_limit
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
from vllm.entrypoints.speech_to_text.transcription.serving import OpenAIServingTranscription
from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest
from vllm.entrypoints.speech_to_text.translation.serving import OpenAIServingTranslation
from vllm.v1.engine.exceptions import EngineDeadError

from workers.engine.base import LostError, RefusedError, Response
from workers.engine.media import need_audio
from workers.engine.vllm_request import refuse_forbidden, refusing
from workers.runtime import speech

TRANSCRIBE, TRANSLATE = "transcriptions", "translations"
ROUTES = (TRANSCRIBE, TRANSLATE)
LISTS = "[]"  # how a form's field ends that may come several times


class Speech:
    """The handlers of a model that takes recordings, by route; none for one that does not."""

    def __init__(self, handlers: dict[str, tuple[type[BaseModel], Callable[..., Any]]]) -> None:
        self._handlers = handlers

    @classmethod
    async def of(cls, llm: Any, served_name: str, adapters: dict[str, Any], passes_on: bool) -> Speech:
        """For a running AsyncLLM; `adapters` is kept, not copied. `passes_on`: see `rendering.Rendering`."""
        if "transcription" not in await llm.get_supported_tasks():
            return cls({})
        models = OpenAIServingModels(llm, [BaseModelPath(name=served_name, model_path=llm.model_config.model)])
        models.lora_requests = adapters
        transcription = OpenAIServingTranscription(llm, models, request_logger=None)
        translation = OpenAIServingTranslation(llm, models, request_logger=None)
        if passes_on:
            transcription.renderer = translation.renderer = _Whole(llm.renderer)
        return cls(
            {
                TRANSCRIBE: (TranscriptionRequest, transcription.create_transcription),
                TRANSLATE: (TranslationRequest, translation.create_translation),
            }
        )

    async def call(self, request_id: str, route: str, body: bytes, say: Callable[[bytes], None]) -> Response:
        """Answer a request; what a stream says before its end goes to `say`.

        Raises:
            RefusedError: The model cannot do this, or the recording or a field is wrong.
            LostError: The engine is dead.
        """
        if route not in self._handlers:
            raise RefusedError(f"this model does not support {route}: it takes no recordings", status=404)
        kind, handler = self._handlers[route]
        recording = speech.decode(body)
        file = UploadFile(io.BytesIO(recording.file), size=len(recording.file), filename=recording.filename)
        # Only its id is read of it, which vLLM puts into the answer.
        raw = Request({"type": "http", "headers": [(b"x-request-id", request_id.encode("latin-1", "replace"))]})
        try:
            with refusing():
                need_audio()
                request = kind(**_fields(recording.fields), file=file)
                refuse_forbidden(getattr(request, "vllm_xargs", None) or ())
                answered = await handler(await read_upload_with_limit(file), request, raw)
        except EngineDeadError as error:
            raise LostError("the engine has died") from error
        if isinstance(answered, ErrorResponse):
            raise RefusedError(answered.error.message, answered.error.code, answered.error.param)
        if isinstance(answered, BaseModel):
            return Response(200, bytes(JSONResponse(answered.model_dump()).body))
        async for event in answered:
            say(event.encode())
        return Response(200, b"", "text/event-stream")


class _Whole:
    """vLLM's renderer, giving the engine media whole: see `rendering.Rendering`."""

    def __init__(self, renderer: Any) -> None:
        self._renderer = renderer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)

    async def render_cmpl_async(self, prompts: Any, *options: Any, **more: Any) -> Any:
        return await self._renderer.render_cmpl_async(prompts, *options, **{**more, "skip_mm_cache": True})


def _fields(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """A form's fields as vLLM's server reads them: the last of each name counts."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name.endswith(LISTS):
            found.setdefault(name, []).append(value)
        else:
            found[name] = value
    return found
