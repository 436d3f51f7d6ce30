"""A pooling model answers as plain vLLM's server does: embeddings, scores, ranks."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments import Deployment, deployed
from tests.parity import plain
from tests.reference import plain_vllm

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TEXTS = ["the river is cold", "a stone bridge over the sea", "write the code"]
# A route, its name at vLLM, and a body.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a text": ("/v1/embeddings", "/v1/embeddings", {"input": TEXTS[0]}),
    "texts": ("/v1/embeddings", "/v1/embeddings", {"input": TEXTS}),
    "token ids": ("/v1/embeddings", "/v1/embeddings", {"input": [[10, 400, 500], [600]]}),
    "base64": ("/v1/embeddings", "/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"}),
    "a conversation": ("/v1/embeddings", "/v1/embeddings", {"messages": [{"role": "user", "content": TEXTS[0]}]}),
    "pooling": ("/v1/pooling", "/pooling", {"input": TEXTS}),
    "scores": ("/v1/score", "/v1/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:]}),
    "ranks": ("/v1/rerank", "/v1/rerank", {"query": TEXTS[0], "documents": TEXTS}),
    "too long": ("/v1/embeddings", "/v1/embeddings", {"input": "word " * 5000}),
    "dimensions that it has not": ("/v1/embeddings", "/v1/embeddings", {"input": TEXTS[0], "dimensions": 3}),
    "nothing": ("/v1/embeddings", "/v1/embeddings", {}),
    "another task": ("/v1/classify", "/classify", {"input": TEXTS[0]}),
}


@pytest.fixture(scope="module")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Any]]:
    """What plain vLLM's server answers; it runs only while it is asked."""
    folder = tmp_path_factory.mktemp("plain-pooling")
    with (
        plain_vllm(tiny_model, folder, runner="pooling", convert="embed") as base,
        httpx.Client(timeout=60) as http,
    ):
        return {name: said(http, f"{base}{path}", body) for name, (_, path, body) in CASES.items()}


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, expected: dict[str, tuple[int, Any]]
) -> Iterator[Deployment]:
    """After the plain server has ended."""
    folder = tmp_path_factory.mktemp("pooling")
    shape = ("+recipe=tiny_embedding", "engine.canary_interval_s=0.5", f"model.path=tiny:{tiny_model}")
    with deployed(folder, *shape, name="pooling") as running:
        yield running


def said(http: httpx.Client, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and content of an answer, with what may differ left out; of an error its status alone."""
    answer = http.post(url, json={"model": "tiny", **body})
    return answer.status_code, plain(answer.json()) if answer.status_code == 200 else None


@pytest.mark.parametrize("name", CASES)
def test_it_answers_what_plain_vllm_answers(
    deployment: Deployment, expected: dict[str, tuple[int, Any]], name: str
) -> None:
    """Vectors, scores and usage alike; what vLLM refuses is refused."""
    path, _, body = CASES[name]

    assert said(deployment.http, deployment.endpoint.url.removesuffix("/v1") + path, body) == expected[name]


def test_the_official_client_reads_vectors_in_both_forms(deployment: Deployment) -> None:
    """Floats, and base64 of the same little-endian floats."""
    floats = deployment.client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    raw = deployment.http.post(
        f"{deployment.endpoint.url}/embeddings", json={"model": "tiny", "input": TEXTS, "encoding_format": "base64"}
    ).json()
    packed = [base64.b64decode(item["embedding"]) for item in raw["data"]]

    assert [len(item.embedding) for item in floats.data] == [256] * 3
    for item, content in zip(floats.data, packed, strict=True):
        assert struct.unpack("<256f", content) == pytest.approx(item.embedding)


def test_a_model_that_embeds_does_not_chat(deployment: Deployment) -> None:
    """400, and the worker lives on."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
    refused = deployment.http.post(f"{deployment.endpoint.url}/chat/completions", json=chat)

    assert refused.status_code == 400
    assert "computes embeddings and scores" in refused.json()["error"]["message"]
    assert deployment.client.embeddings.create(model="tiny", input="still there").data


def test_a_pooling_engine_is_watched_like_any_other(deployment: Deployment) -> None:
    """Its worker sends it a token to compute while nothing else does, and it answers."""
    asked = time.monotonic()
    while not deployment.metric("embedding-0", "baton_worker_canaries_total", result="answered"):
        assert time.monotonic() - asked < 20
        time.sleep(0.1)

    assert deployment.metric("embedding-0", "baton_worker_canaries_total", result="failed") == 0
