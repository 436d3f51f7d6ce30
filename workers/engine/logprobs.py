"""Log probabilities in the words of OpenAI's two APIs, made by vLLM's own functions (0.32)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from vllm.entrypoints.generate.base.serving import clamp_prompt_logprobs
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion


class _Chat(OpenAIServingChat):  # type: ignore[misc]  # mypy does not follow vLLM here
    """vLLM's server class, for the one method that needs nothing of its state."""

    def __init__(self) -> None:
        self.return_tokens_as_token_ids = False


class _Completion(OpenAIServingCompletion):  # type: ignore[misc]
    def __init__(self) -> None:
        self.return_tokens_as_token_ids = False


_chat, _completion = _Chat(), _Completion()


def of_chat(tokenizer: Any, request: Any, ids: Sequence[int], tops: Sequence[Any]) -> bytes:
    """The `logprobs` object of a chat's choice: one entry for each of the ids, `tops` in the same order."""
    found = _chat._create_chat_logprobs(
        token_ids=ids,
        top_logprobs=tops,
        tokenizer=tokenizer,
        num_output_top_logprobs=request.top_logprobs,
        logprob_token_ids=request.logprob_token_ids,
        return_as_token_id=request.return_tokens_as_token_ids,
    )
    return bytes(found.model_dump_json().encode())


def of_completion(
    tokenizer: Any, request: Any, ids: Sequence[int], tops: Sequence[Any], offset: int
) -> tuple[bytes, int]:
    """The `logprobs` object of a completion's choice, and the text offset at which the next one begins."""
    found = _completion._create_completion_logprobs(
        token_ids=ids,
        top_logprobs=tops,
        num_output_top_logprobs=request.logprobs,
        tokenizer=tokenizer,
        logprob_token_ids=request.logprob_token_ids,
        initial_text_offset=offset,
        return_as_token_id=request.return_tokens_as_token_ids,
    )
    after = found.text_offset[-1] + len(found.tokens[-1]) if found.tokens else offset
    return bytes(found.model_dump_json().encode()), after


def of_prompt(tops: Sequence[Any]) -> bytes:
    """The `prompt_logprobs` of a choice: for each token of the prompt a map from token id to what was found."""
    clamped = clamp_prompt_logprobs(list(tops))
    return msgspec.json.encode(
        [None if at is None else {str(token): one for token, one in at.items()} for at in clamped]
    )
