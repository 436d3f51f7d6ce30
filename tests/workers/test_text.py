"""Prompts become the ids that transformers would make of them, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from workers.frontend.errors import ApiError
from workers.frontend.text import Text
from workers.runtime.wire import unpack

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "naïve café 日本\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
    ],
    [{"role": "user", "content": "<b>&'\"</b>"}],
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chats_have_the_ids_of_transformers(tiny_model: Path, messages: list[dict[str, Any]]) -> None:
    """Template and special tokens included; text parts are joined by newlines, as vLLM does."""
    joined = [
        {**item, "content": "\n".join(part["text"] for part in item["content"])}
        if isinstance(item["content"], list)
        else item
        for item in messages
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = tokenizer.apply_chat_template(joined, add_generation_prompt=True, tokenize=True, return_dict=False)

    assert unpack(Text(tiny_model).chat(messages, {})) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_completions_have_the_ids_of_transformers(tiny_model: Path) -> None:
    """With the begin token that the tokenizer adds."""
    text = "The quick brown fox"

    assert unpack(Text(tiny_model).encode(text)) == AutoTokenizer.from_pretrained(tiny_model)(text)["input_ids"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        pytest.param([], "must not be empty", id="none"),
        pytest.param([{"content": "x"}], r"messages\[0\] has no role", id="no role"),
        pytest.param([{"role": "user", "content": 3}], "neither text nor a list", id="number"),
        pytest.param(
            [{"role": "user", "content": [{"type": "image_url"}]}], "'image_url' cannot be tokenized", id="image"
        ),
        pytest.param([{"role": "wizard", "content": "x"}], "the chat template refused", id="unknown role"),
    ],
)
def test_messages_that_cannot_be_rendered_are_the_clients_fault(
    tiny_model: Path, messages: list[dict[str, Any]], message: str
) -> None:
    """400, saying which message."""
    with pytest.raises(ApiError, match=message) as refused:
        Text(tiny_model).chat(messages, {})
    assert refused.value.status == 400
