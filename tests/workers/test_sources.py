"""Which prompts a worker makes, and what it is sent to make them of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from launch.recipe import Tiny, Tokenize
from launch.tiny_model import make_tiny_model
from workers.frontend.openai import options
from workers.frontend.sources import guess, has_media, source, spoken, worker_tokenizes

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "what is this?"}


def user(*parts: Any) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": list(parts)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that a template and a tokenizer describe in full."""
    for name, content in (
        ("tokenizer.json", {}),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
        ("config.json", {"architectures": ["LlamaForCausalLM"]}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "arguments"),
    [
        pytest.param({}, {"tokenizer_mode": "mistral"}, id="Mistral's tokenizer asked for"),
        pytest.param({}, {"tokenizer": "/another"}, id="another tokenizer"),
        pytest.param({"tekken.json": "{}"}, {}, id="Mistral's tokenizer there"),
        pytest.param({"tokenizer.model.v3": ""}, {}, id="Mistral's older tokenizer there"),
        pytest.param({"tokenizer.json": None}, {}, id="no tokenizer.json"),
        pytest.param({"tokenizer_config.json": None}, {}, id="no tokenizer_config.json"),
        pytest.param({"config.json": '{"architectures": ["GptOssForCausalLM"]}'}, {}, id="Harmony"),
        pytest.param({"config.json": '{"architectures": ["DeepseekV32ForCausalLM"]}'}, {}, id="written in code"),
        pytest.param(
            {"tokenizer_config.json": "{}", "chat_template.json": "{}"}, {}, id="the processor alone has a template"
        ),
    ],
)
def test_a_worker_makes_the_prompts_that_only_vllm_can(
    folder: Path, changed: dict[str, str | None], arguments: dict[str, Any]
) -> None:
    """And the frontend those of all other models, unless the recipe says who."""
    assert not worker_tokenizes(Tokenize.AUTO, folder, {"chat_template": None, "tokenizer_mode": "hf"})
    for name, content in changed.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content)

    assert worker_tokenizes(Tokenize.AUTO, folder, arguments)
    assert not worker_tokenizes(Tokenize.FRONTEND, folder, arguments)
    assert worker_tokenizes(Tokenize.WORKER, folder, {})


def test_a_model_that_sees_needs_a_worker_only_for_what_is_seen(tmp_path: Path) -> None:
    """Its texts are as any other model's."""
    assert not worker_tokenizes(Tokenize.AUTO, make_tiny_model(tmp_path / "vlm", kind=Tiny.VISION), {})


@pytest.mark.parametrize(
    ("messages", "media"),
    [
        pytest.param([{"role": "user", "content": "hello"}], False, id="a string"),
        pytest.param([user(TEXT, "and a string")], False, id="texts"),
        pytest.param([{"role": "assistant", "content": None}, {"role": "user"}], False, id="nothing"),
        pytest.param([user(TEXT), user(TEXT, IMAGE)], True, id="an image later on"),
        pytest.param([user({"type": "smell"})], True, id="an unknown kind, which vLLM refuses"),
        pytest.param([user(7)], True, id="no part at all"),
        pytest.param(
            [{"role": "user", "content": {"type": "image_url"}}], False, id="no list, which the frontend refuses"
        ),
    ],
)
def test_media_are_whatever_is_not_text(messages: list[dict[str, Any]], media: bool) -> None:
    """In any message."""
    assert has_media(messages) is media


def test_options_carry_no_media() -> None:
    """They travel on every leg, and media only on the first; parsers of tool calls read the texts."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "functions.f:0"}]}
    fields = {"model": "m", "messages": [user(TEXT, IMAGE), call], "tools": [{"type": "function"}]}

    assert msgspec.json.decode(options(fields, chat=True))["messages"] == [user(TEXT), call]
    assert spoken([{"role": "user", "content": "as it is"}]) == [{"role": "user", "content": "as it is"}]
    assert msgspec.json.decode(source(messages=fields["messages"])) == {"messages": fields["messages"]}


def test_the_guess_grows_with_text_and_with_media() -> None:
    """The router weighs a prompt before it is made."""
    short, long = (
        guess({"messages": [user(TEXT)]}),
        guess({"messages": [user(TEXT), user({**TEXT, "text": "x" * 4000})]}),
    )

    assert 1 <= short < 10
    assert long > 1000
    assert guess({"messages": [user(TEXT, IMAGE)]}) > short + 1000
    assert guess({"prompt": "x" * 400}) == 101
    assert guess({"prompt": [1, 2, 3]}) == 1
