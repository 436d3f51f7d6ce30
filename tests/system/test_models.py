"""Several models in one deployment: each request finds its own, and what becomes of one does not touch the others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from tokenizers import Tokenizer

from tests.adapters import make_adapter
from tests.deployments import Deployment, deployed, targets

TEXT = "the quick river under the green bridge of stone, because machines write code"
MODELS = ("chat", "fine")
PROMPT = list(range(300, 300 + 256))


@pytest.fixture(scope="module")
def fine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer makes more, shorter tokens of a text, and whose template writes roles otherwise."""
    folder = tmp_path_factory.mktemp("fine") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for message in messages %}{{ message.role }} says {{ message.content }};{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def lora_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter."""
    return make_adapter(tmp_path_factory.mktemp("lora") / "a").parent


@pytest.fixture(scope="module")
def two(tiny_model: Path, fine: Path, lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two models with echo engines; those of the second are two."""
    shape = [
        *("+recipe=tiny_two_models", "engine.backend=echo", "engine.echo_cache_blocks=500", "frontend.router=kv"),
        *(f"models.chat.model.path=tiny:{tiny_model}", f"engine.lora_dirs=[{lora_dir}]"),
        *(f"models.embed.model.path={fine}", "models.embed.model.name=fine"),
        *("models.embed.roles.embedding.replicas=0", "models.embed.roles.aggregated.replicas=2"),
        *("cluster.cpu_engines_per_node=3", "models.embed.frontend.router_direct=true"),
    ]
    with deployed(tmp_path_factory.mktemp("two"), *shape, name="two") as running:
        yield running


@pytest.fixture
def admin(two: Deployment) -> Iterator[httpx.Client]:
    """With the admin key."""
    headers = {"Authorization": f"Bearer {two.run.admin_key()}"}
    with httpx.Client(base_url=two.endpoint.url.removesuffix("/v1"), headers=headers, timeout=60) as client:
        yield client


def base(two: Deployment) -> str:
    """Where the routes outside of /v1 are."""
    return two.endpoint.url.removesuffix("/v1")


def until(holds: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tokenizers(tiny_model: Path, fine: Path) -> dict[str, Tokenizer]:
    """Each model's own, read from its folder."""
    return {
        name: Tokenizer.from_file(str(path / "tokenizer.json"))
        for name, path in zip(MODELS, (tiny_model, fine), strict=True)
    }


def test_each_model_has_its_own_tokenizer_and_template(two: Deployment, tokenizers: dict[str, Tokenizer]) -> None:
    """The ids of a text are those of the model that is named, there and back."""
    answers = {
        name: two.http.post(f"{base(two)}/tokenize", json={"model": name, "prompt": TEXT}).json() for name in MODELS
    }
    chats = {
        name: two.http.post(
            f"{base(two)}/tokenize", json={"model": name, "messages": [{"role": "user", "content": TEXT}]}
        ).json()["tokens"]
        for name in MODELS
    }

    for name in MODELS:
        assert answers[name]["tokens"] == tokenizers[name].encode(TEXT).ids
        assert (
            two.http.post(f"{base(two)}/detokenize", json={"model": name, "tokens": answers[name]["tokens"]})
            .json()["prompt"]
            .endswith(TEXT)
        )
    assert answers["fine"]["count"] > answers["chat"]["count"]
    assert f"user says {TEXT};" in tokenizers["fine"].decode(chats["fine"], skip_special_tokens=False)
    assert "says" not in tokenizers["chat"].decode(chats["chat"], skip_special_tokens=False)


CHAT = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 4}
COUNTED: dict[str, tuple[str, dict[str, Any], Callable[[Any], int]]] = {
    "chat": ("/v1/chat/completions", CHAT, lambda answer: answer["usage"]["prompt_tokens"]),
    "message": (
        "/v1/messages",
        CHAT,
        lambda answer: answer["usage"]["input_tokens"] + (answer["usage"].get("cache_read_input_tokens") or 0),
    ),
    "count": ("/v1/messages/count_tokens", {"messages": CHAT["messages"]}, lambda answer: answer["input_tokens"]),
    "response": (
        "/v1/responses",
        {"input": TEXT, "max_output_tokens": 4},
        lambda answer: answer["usage"]["input_tokens"],
    ),
    "response's count": ("/v1/responses/input_tokens", {"input": TEXT}, lambda answer: answer["input_tokens"]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_every_route_finds_the_model_that_is_named(two: Deployment, name: str) -> None:
    """The prompt is counted as that model's tokenizer and template make it, and the answer bears its name."""
    path, body, count = COUNTED[name]
    for model in MODELS:
        asked = {"model": model, "messages": CHAT["messages"]}
        expected = two.http.post(f"{base(two)}/tokenize", json=asked).json()["count"]
        answer = two.http.post(f"{base(two)}{path}", json={"model": model, **body}).raise_for_status().json()

        assert count(answer) == expected
        assert answer.get("model", model) == model


def test_completions_go_to_the_workers_of_their_model(two: Deployment) -> None:
    """The echo engine says the prompt again, in the words of its own tokenizer."""
    for model in MODELS:
        for _ in range(5):
            answer = two.client.completions.create(model=model, prompt=TEXT, max_tokens=200)
            assert TEXT in answer.choices[0].text
            assert answer.model == model


def test_a_name_that_nobody_has_is_answered_with_those_that_there_are(two: Deployment) -> None:
    """404; and 400 where none is given, since neither model is meant more than the other."""
    unknown = two.http.post(f"{two.endpoint.url}/chat/completions", json={"model": "tiny", **CHAT})
    missing = [
        two.http.post(f"{base(two)}{path}", json=body)
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/tokenize", {"prompt": TEXT}),
            ("/v1/embeddings", {"input": TEXT}),
        )
    ]

    assert unknown.status_code == 404
    assert "serves 'chat', 'fine'" in unknown.json()["error"]["message"]
    for answer in missing:
        assert answer.status_code == 400
        assert "model is missing: this deployment serves 'chat', 'fine'" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "model"


def test_all_models_are_listed_and_published(two: Deployment) -> None:
    """At /v1/models, in Anthropic's form too, in endpoint.json, and as labels of the metrics pages."""
    with Anthropic(base_url=base(two), auth_token=two.run.api_key()) as client:
        assert [model.id for model in client.models.list()] == list(MODELS)
    assert [model.id for model in two.client.models.list()] == list(MODELS)
    assert two.endpoint.models == list(MODELS)
    labels = [item["labels"] for item in targets(two.run)]
    assert {item["member"]: item.get("model") for item in labels} == {
        "chat-aggregated-0": "chat",
        "embed-aggregated-0": "fine",
        "embed-aggregated-1": "fine",
        "frontend-0": None,
    }
    before = two.metric("frontend-0", "baton_frontend_completion_tokens_total", model="fine")
    two.client.completions.create(model="chat", prompt=TEXT, max_tokens=7)
    assert two.metric("frontend-0", "baton_frontend_completion_tokens_total", model="fine") == before
    two.client.completions.create(model="fine", prompt=TEXT, max_tokens=7)
    assert two.metric("frontend-0", "baton_frontend_completion_tokens_total", model="fine") == before + 7


def test_the_same_token_ids_are_other_blocks_in_another_model(two: Deployment) -> None:
    """What the workers of one model cache of a prompt is nothing that the other's router counts on, or finds."""

    def hits(model: str) -> tuple[float, float]:
        return tuple(  # type: ignore[return-value]
            two.metric("frontend-0", f"baton_frontend_kv_{name}_total", model=model)
            for name in ("hit_tokens", "predicted_hit_tokens")
        )

    def said_again(model: str) -> tuple[float, float]:
        before = hits(model)
        two.client.completions.create(model=model, prompt=PROMPT, max_tokens=1)
        return hits(model)[0] - before[0], hits(model)[1] - before[1]

    assert said_again("chat") == (0, 0)
    until(lambda: said_again("chat")[0] > 200)
    assert said_again("fine") == (0, 0)
    until(lambda: min(said_again("fine")) > 200)


def test_the_requests_of_a_batch_each_find_their_model(two: Deployment) -> None:
    """Two models in one file."""
    content = b"\n".join(
        json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}).encode()
        for name in (*MODELS, "tiny")
        for body in [{"model": name, "prompt": TEXT, "max_tokens": 3}]
    )
    file = two.client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = two.client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    until(lambda: two.client.batches.retrieve(batch.id).status == "completed")
    done = two.client.batches.retrieve(batch.id)
    assert done.output_file_id
    assert done.error_file_id
    answers = [json.loads(line) for line in two.client.files.content(done.output_file_id).text.splitlines()]
    failed = [json.loads(line) for line in two.client.files.content(done.error_file_id).text.splitlines()]

    assert {item["custom_id"]: item["response"]["body"]["model"] for item in answers} == {name: name for name in MODELS}
    assert [(item["custom_id"], item["response"]["status_code"]) for item in failed] == [("tiny", 404)]


def test_an_adapter_belongs_to_one_model(two: Deployment, admin: httpx.Client, lora_dir: Path) -> None:
    """It is loaded by that model's workers, asked for by its name, and no other model may have one of that name."""
    body = {"lora_name": "a", "lora_path": str(lora_dir / "a")}
    whose = admin.post("/v1/load_lora_adapter", json=body)
    unknown = admin.post("/v1/load_lora_adapter", json={**body, "model": "embed"})
    taken = admin.post("/v1/load_lora_adapter", json={**body, "lora_name": "fine", "model": "chat"})
    loaded = admin.post("/v1/load_lora_adapter", json={**body, "model": "chat"})
    twice = admin.post("/v1/load_lora_adapter", json={**body, "model": "fine"})
    try:
        assert (whose.status_code, unknown.status_code, taken.status_code) == (400, 404, 409)
        assert "'chat' and 'fine' are meant" in whose.json()["error"]["message"]
        assert [item["member"] for item in loaded.json()["members"]] == ["chat-aggregated-0"]
        assert twice.status_code == 409
        assert "go to the model 'chat'" in twice.json()["error"]["message"]
        until(lambda: [model.id for model in two.client.models.list()] == ["chat", "a", "fine"])
        assert two.client.models.retrieve("a").model_dump()["parent"] == "chat"
        answer = two.client.completions.create(model="a", prompt=TEXT, max_tokens=50)
        assert answer.model == "a"
        assert TEXT in answer.choices[0].text
    finally:
        admin.post("/v1/unload_lora_adapter", json={"lora_name": "a", "model": "chat"}).raise_for_status()
    until(lambda: [model.id for model in two.client.models.list()] == list(MODELS))


def test_a_client_names_a_worker_of_its_model(two: Deployment) -> None:
    """Where that model's part of the recipe allows it."""

    def asked(model: str, worker: str) -> httpx.Response:
        body = {"model": model, "prompt": TEXT, "max_tokens": 1}
        return two.http.post(f"{two.endpoint.url}/completions", json=body, headers={"x-baton-worker": worker})

    for worker in ("embed-aggregated-0", "embed-aggregated-1"):
        before = two.metric("frontend-0", "baton_frontend_kv_requests_total", model="fine", worker=worker)
        assert asked("fine", worker).status_code == 200
        assert two.metric("frontend-0", "baton_frontend_kv_requests_total", worker=worker) == before + 1
    assert asked("chat", "chat-aggregated-0").status_code == 403
    refused = asked("fine", "chat-aggregated-0")
    assert refused.status_code == 503
    assert "ready are embed-aggregated-0, embed-aggregated-1" in refused.json()["error"]["message"]


def test_limits_are_a_models_own(admin: httpx.Client) -> None:
    """Changed for the one that is named, or for all."""
    before = admin.get("/admin/limits").json()["models"]
    try:
        one = admin.post("/admin/limits", json={"model": "fine", "queue_requests": 7}).json()
        assert one["limits"]["queue_requests"] == 7
        every = admin.get("/admin/limits").json()["models"]
        assert every["fine"]["limits"]["queue_requests"] == 7
        assert every["chat"] == before["chat"]
    finally:
        admin.post("/admin/limits", json={"queue_requests": before["chat"]["limits"]["queue_requests"]})
    assert admin.get("/admin/limits").json()["models"] == before


def test_a_role_is_named_with_its_model(admin: httpx.Client) -> None:
    """As its engines are; the bare role is that of every model."""
    named = admin.post("/admin/clear", json={"role": "embed-aggregated"}).json()["members"]
    every = admin.post("/admin/clear", json={"role": "aggregated"}).json()["members"]
    wrong = admin.post("/admin/clear", json={"role": "decode"})

    assert [item["member"] for item in named] == ["embed-aggregated-0", "embed-aggregated-1"]
    assert len(every) == 3
    assert "it has chat-aggregated, embed-aggregated" in wrong.json()["error"]["message"]


def test_the_death_of_a_models_worker_leaves_the_others_untouched(two: Deployment) -> None:
    """A stream of the other goes on, only the model without workers refuses, and /health says which that is."""
    process = two.pids()["chat-aggregated-0"]
    stream = two.client.completions.create(model="fine", prompt=PROMPT * 8, max_tokens=1500, stream=True)
    tokens = iter(stream)
    next(tokens)
    os.killpg(process, signal.SIGKILL)
    seen: dict[str, Any] = {}

    def noticed() -> bool:
        answer = two.http.get(f"{base(two)}/health")
        seen.update(answer.json(), code=answer.status_code)
        return bool(seen["status"] != "ready")

    until(noticed, 10)
    ready = {name: two.http.get(f"{two.endpoint.url}/models/{name}/ready") for name in MODELS}
    refused = two.http.post(f"{two.endpoint.url}/chat/completions", json={"model": "chat", **CHAT})
    other = two.http.post(f"{two.endpoint.url}/chat/completions", json={"model": "fine", **CHAT})
    listed = [model.id for model in two.client.models.list()]

    assert (seen["status"], seen["code"]) == ("degraded", 200)
    assert seen["reason"] == "no aggregated worker of the model 'chat' is ready"
    assert seen["models"] == {"chat": "unavailable", "fine": "ready"}
    assert {name: answer.status_code for name, answer in ready.items()} == {"chat": 503, "fine": 200}
    assert ready["chat"].json()["missing"] == ["aggregated"]
    assert refused.status_code == 503
    assert "model 'chat'" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"]
    assert other.status_code == 200
    assert listed == ["fine"]
    assert sum(1 for _ in tokens) >= 1400
    until(lambda: two.http.get(f"{base(two)}/health").json()["status"] == "ready")
    assert two.client.completions.create(model="chat", prompt=TEXT, max_tokens=3).choices
