"""Prompts that a worker makes itself, with vLLM's own renderer (0.32): those with media, and those of models whose prompt
only vLLM knows how to make.

The worker of a request's first leg renders it; its token ids and its processed media go on to the later legs, which neither
fetch nor decode anything again. A decode engine needs the media too, though it pulls the KV cache that was computed from
them: its positions may depend on them, and a request that it has to evict is computed again from the beginning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.inputs import mm_input
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

import workers.engine.media  # noqa: F401 - importing it closes what vLLM leaves open
from workers.engine.base import Ask, RefusedError
from workers.engine.options import ServingOptions
from workers.engine.vllm_request import read_options, refusing
from workers.runtime.wire import Shape

INLINE = 2**62  # tensors go into the one buffer, however large
_encoder = MsgpackEncoder(size_threshold=INLINE)
_decoder = MsgpackDecoder(list[MultiModalFeatureSpec])
# Where the prompt is in a request of each API; "messages" in the others.
PROMPT_FIELDS = {Shape.COMPLETION: "prompt", Shape.RESPONSE: "input"}


class Rendering:
    """Makes the prompt of a leg. `passes_on` says that other engines get what is made here."""

    def __init__(self, llm: Any, serving: ServingOptions, passes_on: bool) -> None:
        self._max_model_len: int = llm.model_config.max_model_len
        self._passes_on = passes_on
        self._online = OnlineRenderer(
            llm.model_config,
            llm.renderer,
            request_logger=None,
            chat_template=load_chat_template(serving.chat_template),
            chat_template_content_format="auto",
            enable_auto_tools=serving.enable_auto_tool_choice,
            tool_parser=serving.tool_call_parser,
            reasoning_parser=serving.reasoning_parser,
            default_chat_template_kwargs=dict(serving.default_chat_template_kwargs),
        )
        if llm.model_config.is_multimodal_model:
            self._online.warmup()  # what the first image would else wait for, and with it the worker's whole loop

    async def rendered(self, ask: Ask) -> Ask:
        """The same leg with its prompt, and with the engine's input where that is more than the prompt.

        Raises:
            RefusedError: vLLM's server would refuse the messages or media too, or they do not fit the context.
        """
        if not ask.source:
            return replace(ask, inputs=unpack(ask.features, ask.prompt)) if ask.features else ask
        with refusing():
            made = await self._render(ask)
        ids = made.get("prompt_token_ids")
        if ids is None:
            raise RefusedError("this model's prompts are not made of tokens alone, which is not served")
        if len(ids) >= self._max_model_len:
            raise RefusedError(
                f"this model's maximum context length is {self._max_model_len} tokens, but the prompt has {len(ids)} tokens, "
                "media included, and leaves no room for an answer: shorten it",
                param=PROMPT_FIELDS.get(ask.render.shape, "messages"),
            )
        features = pack(made) if ask.prefill_only or ask.encode_only else b""
        return replace(ask, prompt=list(ids), inputs=made, features=features)

    async def _render(self, ask: Ask) -> Any:
        # What other engines get must be whole; and an engine must not see some media by reference and others whole: vLLM's
        # two processes would no longer agree on what the second has cached.
        options: dict[str, Any] = {**read_options(ask.options), **msgspec.json.decode(ask.source)}
        if ask.render.shape is not Shape.COMPLETION:
            request = ChatCompletionRequest(**options)
            answer = await self._online.render_chat(request, skip_mm_cache=self._passes_on)
        else:
            request = CompletionRequest(**options, max_tokens=1)
            answer = await self._online.render_completion(request, skip_mm_cache=self._passes_on)
        if hasattr(answer, "error"):
            raise RefusedError(answer.error.message, answer.error.code, answer.error.param)
        inputs = answer[1] if ask.render.shape is not Shape.COMPLETION else answer
        return inputs[0]


def pack(made: Any) -> bytes:
    """The processed media of an engine's input, as they travel to the next leg; b"" where there are none."""
    if made["type"] != "multimodal":
        return b""
    features = [
        MultiModalFeatureSpec(data=item, modality=modality, identifier=digest, mm_position=place)
        for modality, items in made["mm_kwargs"].items()
        for item, digest, place in zip(
            items, made["mm_hashes"][modality], made["mm_placeholders"][modality], strict=True
        )
    ]
    (packed,) = _encoder.encode(features)
    return bytes(packed)


def unpack(packed: bytes, prompt: list[int]) -> Any:
    """The engine's input for a prompt that another worker has rendered."""
    kwargs: dict[str, list[Any]] = {}
    digests: dict[str, list[str]] = {}
    places: dict[str, list[Any]] = {}
    for feature in _decoder.decode(packed):
        kwargs.setdefault(feature.modality, []).append(feature.data)
        digests.setdefault(feature.modality, []).append(feature.identifier)
        places.setdefault(feature.modality, []).append(feature.mm_position)
    return mm_input(prompt, kwargs, digests, places)
