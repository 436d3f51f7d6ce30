"""A model whose prompt only vLLM's own code can make, Mistral's tokenizer here, answers as with plain vLLM's server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments import Deployment, deployed
from tests.parity import CASES, TOOLS, Case, answer, chat
from tests.reference import plain_vllm
from tests.tekken import make_mistral_model

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(600)]

OPTIONS = {"tokenizer_mode": "mistral", "tool_call_parser": "mistral"}
NAMES = (
    *("greedy", "seeded", "stop string", "token ids", "several prompts", "echo", "logprobs", "token ids out", "regex"),
    *("chat logprobs", "chat token ids out", "json schema", "choice", "tools unused", "tools none", "bad grammar"),
)
ASKED: dict[str, Case] = {name: CASES[name] for name in NAMES} | {
    "a chat": chat(),
    "two users in a row": Case(
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        },
    ),
    "a tool named": chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "get_weather"}}),
    "an image for a model that sees none": chat(
        content=[{"type": "image_url", "image_url": {"url": "data:,"}}], status=400
    ),
}
ALL = [(name, stream) for name in ASKED for stream in (False, True)]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with Mistral's tokenizer."""
    return make_mistral_model(tiny_model, tmp_path_factory.mktemp("models") / "mistral")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[int, Any]]:
    """What plain vLLM's server answers; it runs only while it is asked."""
    folder = tmp_path_factory.mktemp("plain-mistral")
    with plain_vllm(model, folder, **OPTIONS, enable_auto_tool_choice="") as base, httpx.Client(timeout=120) as http:
        return {(name, stream): answer(http, base, ASKED[name], stream) for name, stream in ALL}


@pytest.fixture(scope="module")
def deployment(
    model: Path, expected: dict[tuple[str, bool], tuple[int, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """A prefill engine, which makes the prompts, and a decode engine, which gets their ids."""
    options = [f"engine.args.{name}={value}" for name, value in OPTIONS.items()]
    folder = tmp_path_factory.mktemp("mistral")
    with deployed(folder, "+recipe=tiny_disagg", *options, f"model.path={model}", name="mistral") as running:
        yield running


@pytest.mark.parametrize(("name", "stream"), ALL)
def test_it_answers_what_plain_vllm_answers(
    deployment: Deployment, expected: dict[tuple[str, bool], tuple[int, Any]], name: str, stream: bool
) -> None:
    """Text, usage, token ids, tool calls; and what vLLM refuses is refused."""
    found = answer(deployment.http, deployment.endpoint.url.removesuffix("/v1"), ASKED[name], stream)

    assert expected[name, stream][0] == ASKED[name].status
    assert found == expected[name, stream]
