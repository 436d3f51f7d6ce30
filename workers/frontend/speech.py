"""Recordings that are to be written down or translated: OpenAI's audio API. The upload goes to one worker as it came."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from launch.recipe import Kind
from workers.frontend.errors import ApiError
from workers.frontend.exchange import call
from workers.frontend.forms import Form, read_form
from workers.frontend.generation import Streamed, framed, openai_event
from workers.frontend.http import Request
from workers.frontend.models import Models
from workers.frontend.reply import REQUEST_ID_HEADER, Reply, told
from workers.frontend.service import Service
from workers.frontend.sources import MEDIUM_TOKENS
from workers.frontend.wishes import wishes
from workers.runtime import speech

# vLLM's routes by ours.
SPEECH_ROUTES = {"/v1/audio/transcriptions": "transcriptions", "/v1/audio/translations": "translations"}
TRUE = ("true", "1", "on", "t", "y", "yes")  # as vLLM's request classes read a form's field
FIELDS: dict[str, Any] = {
    "type": "object",
    "required": ["file", "model"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "model": {"type": "string"},
        "language": {"type": "string"},
        "prompt": {"type": "string"},
        "response_format": {"enum": ["json", "text", "verbose_json", "diarized_json"]},
        "stream": {"type": "boolean"},
        "temperature": {"type": "number"},
    },
}


@dataclass(slots=True)
class Upload:
    """What is asked for by an upload, as `Models.admit` reads it."""

    model: str | None


async def listen(models: Models, request: Request, reply: Reply) -> None:
    """POST /v1/audio/transcriptions and /v1/audio/translations."""
    form = await asyncio.to_thread(read_form, request)
    upload = Upload(form.field("model") or None)
    service = models.admit(upload, generates=True)
    model = upload.model or service.served.name
    streams = form.field("stream").lower() in TRUE
    header = told(request) + service.gate.charge(request.key_id, MEDIUM_TOKENS)
    events = Streamed(reply, header, service.metrics) if streams else None
    await service.gate.turn(request.key_id, MEDIUM_TOKENS)
    with service.gate.passing():
        await _asked(service, request, reply, form, model, header, events)


async def _asked(
    service: Service, request: Request, reply: Reply, form: Form, model: str, header: bytes, events: Streamed | None
) -> None:
    """Have a worker answer. One that was to wait for a prefill worker computes this prompt by itself.

    Raises:
        ApiError: It was refused, or could not be answered, before its first byte.
    """

    def write(data: bytes) -> None:
        if events is not None:
            events.write(framed(data, request.chunked))

    recording = speech.Recording(form.fields, form.file, form.filename, events is not None)
    try:
        called = await call(
            service.pool,
            Kind.DECODE if service.pool.disaggregated else Kind.AGGREGATED,
            request.headers[REQUEST_ID_HEADER],
            SPEECH_ROUTES[request.path],
            speech.encode(recording),
            service.adapter(model),
            wishes(request.headers, {}),
            write,
        )
    except ApiError as error:
        if events is None or not events.begun:
            raise
        reply.status = error.status
        write(openai_event(error))
        reply.end_events()
        return
    if events is None or not events.begun:
        reply.respond(called.status, called.body, header, called.content_type.encode())
    else:
        reply.end_events()
