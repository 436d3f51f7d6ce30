"""The official clients of OpenAI and Anthropic, over echo engines: every route that they know and we serve."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from anthropic.types import MessageParam

from tests.deployments import Deployment

ASKED: dict[str, Any] = {"model": "tiny", "input": "Hello there", "max_output_tokens": 5}
TURNS: list[MessageParam] = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def claude(echo: Deployment) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client; it sends the key as x-api-key."""
    base = echo.endpoint.url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=base, api_key=echo.run.api_key(), max_retries=0, timeout=60) as client:
        yield client


def test_a_response_says_what_it_is(echo: Deployment) -> None:
    """Its text, why it ended, what it cost."""
    answer = client_of(echo).responses.create(**ASKED, instructions="Be brief.", metadata={"a": "b"})
    assert answer.usage

    assert len(answer.output_text) > 5
    assert answer.status == "incomplete"
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.instructions, answer.metadata, answer.max_output_tokens) == ("Be brief.", {"a": "b"}, 5)
    assert answer.usage.output_tokens == 5
    assert answer.usage.total_tokens == answer.usage.input_tokens + 5


def test_a_responses_stream_adds_up_to_the_response(echo: Deployment) -> None:
    """Events numbered without a gap; the deltas join to the text that the last one has."""
    with client_of(echo).responses.stream(**ASKED) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert "".join(deltas) == final.output_text == client_of(echo).responses.create(**ASKED).output_text


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "streamed"])
def test_a_response_goes_on_from_an_earlier_one(echo: Deployment, stream: bool) -> None:
    """Its prompt is the conversation so far, without the earlier instructions; and what is forgotten is not there."""
    first = client_of(echo).responses.create(**ASKED, instructions="Talk at length, and of many things.", stream=stream)
    first = list(first)[-1].response if stream else first
    more: dict[str, Any] = {"model": "tiny", "input": "And then?", "previous_response_id": first.id}
    whole: list[Any] = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And then?"},
    ]
    counted = client_of(echo).responses.input_tokens.count(**more).input_tokens
    kept = client_of(echo).responses.retrieve(first.id)
    items = client_of(echo).responses.input_items.list(first.id).data

    assert counted == client_of(echo).responses.input_tokens.count(model="tiny", input=whole).input_tokens
    assert kept.output == first.output
    assert [getattr(item, "content", None) for item in items] == ["Hello there"]
    client_of(echo).responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client_of(echo).responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client_of(echo).responses.create(**more)


def test_a_response_that_is_not_to_be_stored_is_not(echo: Deployment) -> None:
    """Nor is one in the background."""
    answer = client_of(echo).responses.create(**ASKED, store=False)

    with pytest.raises(openai.NotFoundError):
        client_of(echo).responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError, match="background is not supported"):
        client_of(echo).responses.create(**ASKED, background=True)


def test_a_message_says_what_it_is(claude: anthropic.Anthropic) -> None:
    """Its text, why it ended, what it cost."""
    answer = claude.messages.create(model="tiny", max_tokens=5, messages=TURNS, system="Be brief.")
    counted = claude.messages.count_tokens(model="tiny", messages=TURNS, system="Be brief.")
    cached = answer.usage.cache_read_input_tokens or 0

    assert [block.type for block in answer.content] == ["text"]
    assert (answer.stop_reason, answer.role, answer.usage.output_tokens) == ("max_tokens", "assistant", 5)
    assert answer.usage.input_tokens + cached == counted.input_tokens


def test_a_messages_stream_adds_up_to_the_message(claude: anthropic.Anthropic) -> None:
    """With the usage at its end."""
    whole = claude.messages.create(model="tiny", max_tokens=5, messages=TURNS)
    with claude.messages.stream(model="tiny", max_tokens=5, messages=TURNS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()

    assert [block.type for block in final.content] == ["text"]
    assert text == getattr(final.content[0], "text", None) == getattr(whole.content[0], "text", None)
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, 5)


def test_anthropics_errors_have_anthropics_shape(claude: anthropic.Anthropic, echo: Deployment) -> None:
    """Its client tells them apart by their status, and shows their type."""
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(model="none", max_tokens=5, messages=TURNS)
    with pytest.raises(anthropic.BadRequestError) as wrong:
        claude.messages.create(model="tiny", max_tokens=0, messages=TURNS)
    with pytest.raises(anthropic.AuthenticationError) as stranger:
        claude.with_options(api_key="wrong").messages.create(model="tiny", max_tokens=5, messages=TURNS)
    said = [error.value.body for error in (unknown, wrong, stranger)]
    kinds = [body["error"]["type"] for body in said if isinstance(body, dict)]

    assert kinds == ["not_found_error", "invalid_request_error", "authentication_error"]


def test_models_are_listed_for_both(echo: Deployment, claude: anthropic.Anthropic) -> None:
    """Each in its own shape."""
    assert [model.id for model in client_of(echo).models.list()] == ["tiny"]
    assert client_of(echo).models.retrieve("tiny").owned_by == "baton"
    assert [model.display_name for model in claude.models.list()] == ["tiny"]
    assert claude.models.retrieve("tiny").type == "model"
    with pytest.raises(openai.NotFoundError):
        client_of(echo).models.retrieve("none")


def test_a_files_requests_are_answered_as_a_batch(echo: Deployment) -> None:
    """Right ones into one file, wrong ones into another; nobody else on the machine can read them."""
    bodies: list[dict[str, Any]] = [
        {"model": "tiny", "messages": [{"role": "user", "content": f"number {number}"}], "max_tokens": 3}
        for number in range(30)
    ]
    bodies[7]["max_tokens"] = -1
    batch = run_batch(echo, bodies)
    assert batch.output_file_id
    assert batch.error_file_id
    answers = lines(echo, batch.output_file_id)
    failed = lines(echo, batch.error_file_id)
    alone = client_of(echo).chat.completions.create(**bodies[3])
    found = {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in answers}
    private = [path for name in ("files", "batches") for path in (echo.run.path / name).rglob("*")]

    assert batch.status == "completed"
    assert batch.request_counts
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (30, 29, 1)
    assert found["r3"] == alone.choices[0].message.content
    assert [(line["custom_id"], line["response"]["status_code"]) for line in failed] == [("r7", 400)]
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in private} == {0}
    assert batch.id in [item.id for item in client_of(echo).batches.list()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "1 to 50000 requests", id="empty"),
        pytest.param(b"{", "", id="not JSON"),
        pytest.param(
            b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}', "endpoint", id="url"
        ),
        pytest.param(
            b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {}}\n' * 2,
            "twice",
            id="twice",
        ),
        pytest.param(
            b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"stream": true}}',
            "streamed",
            id="streamed",
        ),
    ],
)
def test_a_batch_that_cannot_be_run_says_why(echo: Deployment, content: bytes, message: str) -> None:
    """And none of its requests is answered."""
    file = client_of(echo).files.create(file=("in.jsonl", content), purpose="batch")
    batch = ended(echo, client_of(echo).batches.create(**of(file.id)))
    assert batch.errors
    assert batch.errors.data

    assert batch.status == "failed"
    assert message in (batch.errors.data[0].message or "")
    assert batch.output_file_id is None


def test_files_come_and_go(echo: Deployment) -> None:
    """Listed in pages, read back as they were, deleted; not for any purpose, not by any name."""
    content = bytes(range(256)) * 10 + b"\r\n--boundary\r\n\r\n"
    made = [client_of(echo).files.create(file=(f"{name}.bin", content), purpose="batch") for name in "abc"]
    names = [file.id for file in client_of(echo).files.list(limit=2, purpose="batch")]

    assert {file.id for file in made} <= set(names)
    assert client_of(echo).files.content(made[0].id).content == content
    assert client_of(echo).files.retrieve(made[1].id).filename == "b.bin"
    for file in made:
        assert client_of(echo).files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client_of(echo).files.retrieve(file.id)
    with pytest.raises(openai.BadRequestError, match="purpose is 'batch'"):
        client_of(echo).files.create(file=("x", b"x"), purpose="fine-tune")
    for name in ("..", "file-x", "../api_key"):
        assert echo.http.get(f"{echo.endpoint.url}/files/{name}/content").status_code == 404


def client_of(deployment: Deployment) -> Any:
    """OpenAI's client; what it returns has more types than are told apart here."""
    return deployment.client


def of(file_id: str) -> Any:
    """Arguments of a batch of chats."""
    return {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}


def run_batch(deployment: Deployment, bodies: list[dict[str, Any]]) -> Any:
    """Have chats answered as a batch, and wait for its end."""
    asked = (
        {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate(bodies)
    )
    content = "\n".join(map(json.dumps, asked)).encode()
    file = client_of(deployment).files.create(file=("in.jsonl", content), purpose="batch")
    return ended(deployment, client_of(deployment).batches.create(**of(file.id)))


def ended(deployment: Deployment, batch: Any) -> Any:
    """The batch at its end."""
    asked = time.monotonic()
    while batch.status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() - asked < 30, batch
        time.sleep(0.1)
        batch = client_of(deployment).batches.retrieve(batch.id)
    return batch


def lines(deployment: Deployment, file_id: str) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [json.loads(line) for line in client_of(deployment).files.content(file_id).text.splitlines()]
