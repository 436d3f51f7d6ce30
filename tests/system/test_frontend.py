"""The HTTP API, over echo engines: what it answers, what it refuses, and what is left when a client goes."""

from __future__ import annotations

import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.deployments import Deployment, deployed

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 5}


def test_models_lists_what_is_served(echo: Deployment) -> None:
    """With its context length."""
    models = list(echo.client.models.list())

    assert [model.id for model in models] == ["tiny"]
    assert models[0].model_dump()["max_model_len"] == 4096


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", {"messages": CHAT["messages"], "max_tokens": 2}),
        ("/completions", {"prompt": "one two", "max_tokens": 2, "model": None}),
        ("/responses", {"input": "one two", "max_output_tokens": 2, "model": ""}),
    ],
)
def test_the_name_of_the_only_model_may_be_left_out(echo: Deployment, path: str, body: dict[str, Any]) -> None:
    """As at vLLM: the answer has it."""
    answer = echo.http.post(f"{echo.endpoint.url}{path}", json=body).raise_for_status()

    assert answer.json()["model"] == "tiny"


def test_health_needs_no_key(echo: Deployment) -> None:
    """A load balancer has none."""
    base = echo.endpoint.url.removesuffix("/v1")

    assert echo.http.get(f"{base}/health", headers={"Authorization": ""}).json() == {"status": "ready"}
    assert echo.http.get(f"{base}/live", headers={"Authorization": ""}).status_code == 200


def test_usage_comes_last_in_a_stream(echo: Deployment) -> None:
    """In a chunk without choices, when it was asked for."""
    chunks = list(
        echo.client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    )

    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"


def test_every_prompt_gets_n_answers(echo: Deployment) -> None:
    """With their indexes in order, and each prompt counted once."""
    one = echo.client.completions.create(model="tiny", prompt="one two", max_tokens=3)
    many = echo.client.completions.create(model="tiny", prompt=["one two", "three"], n=3, max_tokens=3)
    assert one.usage
    assert many.usage

    assert [choice.index for choice in many.choices] == list(range(6))
    assert many.choices[0].text == many.choices[2].text == one.choices[0].text
    assert many.usage.completion_tokens == 18
    assert one.usage.prompt_tokens < many.usage.prompt_tokens < 3 * one.usage.prompt_tokens


def test_prompts_may_be_token_ids(echo: Deployment) -> None:
    """One list, or several."""
    single = echo.client.completions.create(model="tiny", prompt=[10, 11, 12], max_tokens=3)
    several = echo.client.completions.create(model="tiny", prompt=[[10, 11, 12], [13]], max_tokens=3)
    assert single.usage
    assert several.usage

    assert single.usage.prompt_tokens == 3
    assert several.usage.prompt_tokens == 4
    assert several.choices[0].text == single.choices[0].text


def test_a_request_id_goes_in_and_out(echo: Deployment) -> None:
    """The client's own, or a new one."""
    given = echo.http.post(f"{echo.endpoint.url}/chat/completions", json=CHAT, headers={"X-Request-Id": "mine"})
    new = echo.http.post(f"{echo.endpoint.url}/chat/completions", json=CHAT)

    assert given.headers["x-request-id"] == "mine"
    assert len(new.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        pytest.param(b'{"model": "tiny", "messages": [', 400, "not valid JSON", id="malformed"),
        pytest.param(b"\xff\xfe", 400, "not valid JSON", id="not text"),
        pytest.param(
            b'{"model": "tiny", "messages": [{"role": "user", "content": ' + b"[" * 100_000,
            400,
            "not valid JSON",
            id="deeply nested",
        ),
        pytest.param(b'{"model": "tiny"}', 400, "messages", id="no messages"),
        pytest.param(
            CHAT | {"model": "gpt-9"}, 404, "'gpt-9' does not exist; this deployment serves 'tiny'", id="unknown model"
        ),
        pytest.param(CHAT | {"max_tokens": "many"}, 400, "at max_tokens", id="wrong type"),
        pytest.param(CHAT | {"max_tokens": 0}, 400, "at least 1", id="no tokens"),
        pytest.param(
            CHAT | {"max_tokens": 5000}, 400, "max_tokens=5000 is more than the context of 4096", id="too many tokens"
        ),
        pytest.param(CHAT | {"seed": 10**24}, 400, "at seed", id="a number beyond all bounds"),
        pytest.param(CHAT | {"max_completion_tokens": -5}, 400, "at least 1", id="a negative limit by its other name"),
        pytest.param(CHAT | {"n": 0}, 400, "n must be between", id="no choices"),
        pytest.param(
            CHAT | {"messages": [{"role": "user", "content": "word " * 5000}]},
            400,
            "maximum context length is 4096 tokens",
            id="too long",
        ),
        pytest.param(
            CHAT | {"tools": [{"type": "function"}]}, 400, "tools[0] has no function", id="a tool without name"
        ),
        pytest.param(CHAT | {"use_beam_search": True}, 400, "use_beam_search is not supported", id="not served"),
        pytest.param(
            CHAT | {"stream_options": {"include_usage": True}},
            400,
            "only allowed with stream",
            id="options without stream",
        ),
    ],
)
def test_bad_requests_get_openais_error_shape(
    echo: Deployment, body: bytes | dict[str, Any], status: int, message: str
) -> None:
    """A 4xx that says what is wrong; the next request is served."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for stream in (False, True):
        if isinstance(body, dict) and "stream_options" not in body:
            content = json.dumps(body | {"stream": stream}).encode()
        answer = echo.http.post(f"{echo.endpoint.url}/chat/completions", content=content)
        error = answer.json()["error"]

        assert answer.status_code == status
        assert message in error["message"]
        assert error["code"] == status
        assert set(error) == {"message", "type", "param", "code"}


def test_a_wrong_key_is_refused(echo: Deployment) -> None:
    """401, whatever it is."""
    for key in ("wrong", "x" * 1000):
        answer = echo.http.post(
            f"{echo.endpoint.url}/chat/completions", json=CHAT, headers={"Authorization": f"Bearer {key}"}
        )
        assert answer.status_code == 401
    with (
        openai.OpenAI(base_url=echo.endpoint.url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
def test_unknown_routes_and_methods(echo: Deployment, method: str, path: str, status: int) -> None:
    """In the same error shape."""
    answer = echo.http.request(method, f"{echo.endpoint.url.removesuffix('/v1')}{path}")

    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status


@pytest.fixture
def raw(echo: Deployment) -> Any:
    """Send bytes, get bytes until the server closes or falls silent."""
    host, _, port = echo.endpoint.url.removeprefix("http://").removesuffix("/v1").partition(":")

    def exchange(content: bytes, wait_s: float = 1.0) -> bytes:
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.settimeout(wait_s)
            connection.sendall(content)
            got = b""
            try:
                while part := connection.recv(1 << 16):
                    got += part
            except TimeoutError:
                pass
            return got

    return exchange


def test_what_is_not_http_is_answered_and_closed(raw: Any) -> None:
    """And too large a head, or body, as well."""
    assert raw(b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert raw(b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    assert raw(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")


def test_half_a_request_leaves_nothing_behind(echo: Deployment, raw: Any) -> None:
    """Whoever hangs up in its midst was never answered, nor counted; others are."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    halves = [raw(part, wait_s=0.1) for part in (head[:20], head, head + b'{"model": "tiny"')]

    assert halves == [b"", b"", b""]
    assert echo.metric("frontend-0", "baton_frontend_active_requests") == 1  # the page's own
    assert echo.http.post(f"{echo.endpoint.url}/chat/completions", json=CHAT).status_code == 200


def test_a_head_request_gets_a_head_only(raw: Any) -> None:
    """A body would be read as the next answer."""
    got = raw(b"HEAD /live HTTP/1.1\r\nHost: x\r\n\r\nGET /live HTTP/1.1\r\nHost: x\r\n\r\n")

    assert re.findall(rb"HTTP/1.1 (\d+) ", got) == [b"200", b"200"]
    assert got.count(b"alive") == 1


def test_an_offered_upgrade_is_ignored(raw: Any) -> None:
    """Some clients offer HTTP/2 with every request; they are served by HTTP/1.1."""
    got = raw(b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")

    assert re.findall(rb"HTTP/1.1 (\d+) ", got) == [b"200"]


def test_pipelined_requests_are_answered_in_order(raw: Any) -> None:
    """One connection, three requests at once."""
    got = raw(b"".join(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in (b"/live", b"/nothing", b"/health")))

    assert re.findall(rb"HTTP/1.1 (\d+) ", got) == [b"200", b"404", b"200"]


def test_an_old_client_gets_an_unchunked_stream(echo: Deployment, raw: Any) -> None:
    """HTTP/1.0 knows no chunks: the events come plain and the connection closes."""
    body = json.dumps(CHAT | {"stream": True}).encode()
    got = raw(
        b"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
        % (echo.run.api_key().encode(), len(body), body)
    )
    head, _, events = got.partition(b"\r\n\r\n")

    assert b"Transfer-Encoding" not in head
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


def test_many_streams_at_once_are_whole(echo: Deployment) -> None:
    """Each says its own prompt again, none another's."""

    def ask(number: int) -> bool:
        stream = echo.client.completions.create(
            model="tiny", prompt=f"number {number} of many", max_tokens=30, stream=True
        )
        text = "".join(chunk.choices[0].text for chunk in stream)
        alone = echo.client.completions.create(model="tiny", prompt=f"number {number} of many", max_tokens=30)
        return text == alone.choices[0].text and str(number)[0] in text

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(ask, range(128)))


def test_work_for_a_client_that_left_ends_within_a_second(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any
) -> None:
    """At the frontend and at the engine, in a stream and in a unary request."""
    slow = ("engine.backend=echo", "engine.echo_interval_s=0.05", f"model.path=tiny:{tiny_model}")
    with deployed(tmp_path_factory.mktemp("slow"), "+recipe=tiny_disagg", *slow, name="slow") as running:
        for stream in (True, False):
            connection = running.http.build_request(
                "POST", f"{running.endpoint.url}/chat/completions", json=CHAT | {"max_tokens": 2000, "stream": stream}
            )
            host, _, port = running.endpoint.url.removeprefix("http://").removesuffix("/v1").partition(":")
            with socket.create_connection((host, int(port)), 5) as client:
                head = "".join(f"{name}: {value}\r\n" for name, value in connection.headers.items())
                client.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + connection.read())
                _until(lambda: running.metric("decode-0", "baton_worker_streams") == 1)
            left = time.monotonic()
            _until(lambda: running.metric("decode-0", "baton_worker_streams") == 0)
            assert time.monotonic() - left < 1.0
        assert running.metric("frontend-0", "baton_frontend_disconnected_clients_total") == 2


def _until(condition: Any, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
