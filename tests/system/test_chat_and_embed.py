"""A model that chats and one that embeds in one deployment, both with vLLM: each answers as plain vLLM does alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments import Deployment, deployed
from tests.parity import plain
from tests.reference import MODEL, Reference, ask_all, complete, plain_vllm

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(900)]

TEXTS = ["the river is cold", "a stone bridge over the sea", "write the code"]
POOLED: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": TEXTS},
    "/v1/score": {"text_1": TEXTS[0], "text_2": TEXTS[1:]},
    "/v1/rerank": {"query": TEXTS[0], "documents": TEXTS},
}


@pytest.fixture(scope="module")
def vectors(tiny_model: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What plain vLLM's server answers; it runs only while it is asked."""
    folder = tmp_path_factory.mktemp("plain-pooling")
    with (
        plain_vllm(tiny_model, folder, runner="pooling", convert="embed") as base,
        httpx.Client(timeout=60) as http,
    ):
        return {path: pooled(http, f"{base}{path}", "tiny") for path in POOLED}


@pytest.fixture(scope="module")
def both(tiny_model: Path, vectors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """After the plain servers have ended."""
    shape = ("+recipe=tiny_two_models", f"models.chat.model.name={MODEL}")
    models = [f"models.{key}.model.path=tiny:{tiny_model}" for key in ("chat", "embed")]
    with deployed(tmp_path_factory.mktemp("both"), *shape, *models, name="both") as running:
        yield running


def pooled(http: httpx.Client, url: str, model: str) -> Any:
    """An answer without what may differ, and without the name of its model."""
    path = next(path for path in POOLED if url.endswith(path))
    answer = http.post(url, json={"model": model, **POOLED[path]}).raise_for_status()
    return {name: value for name, value in plain(answer.json()).items() if name != "model"}


def test_each_answers_as_plain_vllm_while_the_other_does(
    both: Deployment, reference: Reference, vectors: dict[str, Any]
) -> None:
    """Texts and usage of 50 prompts, with vectors, scores and ranks asked for meanwhile."""
    base = both.endpoint.url.removesuffix("/v1")
    with ThreadPoolExecutor(1) as beside:
        texts = beside.submit(ask_all, both.client, reference.prompts, complete, True)
        found: list[dict[str, Any]] = []
        while not texts.done() or not found:
            found.append({path: pooled(both.http, f"{base}{path}", "embed") for path in POOLED})

    assert texts.result() == reference.completions
    assert all(item == vectors for item in found)


def test_neither_does_what_the_other_does(both: Deployment) -> None:
    """400 with the model's name, and both live on."""
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    spoken = both.http.post(f"{both.endpoint.url}/chat/completions", json={"model": "embed", **chat})
    embedded = both.http.post(f"{both.endpoint.url}/embeddings", json={"model": MODEL, "input": "hello"})

    assert (spoken.status_code, embedded.status_code) == (400, 400)
    assert "'embed' computes embeddings and scores" in spoken.json()["error"]["message"]
    assert f"'{MODEL}' generates text" in embedded.json()["error"]["message"]
    assert both.http.post(f"{both.endpoint.url}/chat/completions", json={"model": MODEL, **chat}).status_code == 200
