"""The edges of the API: TLS, a Unix socket, traces, packed bodies; and batches that are cancelled or lose their process."""

from __future__ import annotations

import gzip
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.certificates import make_certificate
from tests.collector import Collector, collector
from tests.deployments import Deployment, deployed, targets
from tests.system.test_api_clients import ended, lines, of

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 5}
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def traces() -> Iterator[Collector]:
    """Where the deployment sends its traces."""
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def edges(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, traces: Collector) -> Iterator[Deployment]:
    """Echo engines that take 10 ms for a token, behind a frontend with everything."""
    folder = tmp_path_factory.mktemp("edges")
    certificate, key = make_certificate(folder)
    options = [
        *("engine.backend=echo", "engine.echo_interval_s=0.01", f"model.path=tiny:{tiny_model}"),
        *(f"frontend.tls_cert={certificate}", f"frontend.tls_key={key}", f"frontend.unix_socket={folder}/s"),
        *(f"frontend.otlp_endpoint={traces.url}", "frontend.batch_concurrency=2"),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SSL_CERT_FILE", str(certificate))  # what the clients of `deployed` trust
        with deployed(folder, "+recipe=tiny_agg", *options, name="edges") as running:
            yield running


def test_clients_speak_tls_and_nothing_else(edges: Deployment) -> None:
    """The endpoint says https, what serves Prometheus too; our own commands follow."""
    assert edges.endpoint.url.startswith("https://127.0.0.1:")
    assert edges.client.chat.completions.create(**CHAT).usage  # type: ignore[call-overload]
    with pytest.raises(httpx.TransportError):
        httpx.get(edges.endpoint.url.replace("https", "http") + "/models")
    frontend = next(item for item in targets(edges.run) if item["labels"]["member"] == "frontend-0")
    assert frontend["labels"]["__scheme__"] == "https"
    argv = [sys.executable, "-m", "launch.ctl", "edges", "status", "--runs-dir", str(edges.run.path.parent)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "state=serving" in done.stdout) == (0, True), done.stdout + done.stderr


def test_the_unix_socket_serves_its_owner(edges: Deployment) -> None:
    """With the key, as everywhere."""
    path = edges.run.path.parent.parent / "s"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://baton") as client:
        key = {"Authorization": f"Bearer {edges.run.api_key()}"}

        assert client.get("/live").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.post("/v1/chat/completions", json=CHAT, headers=key).status_code == 200
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_request_is_a_span_of_its_clients_trace(edges: Deployment, traces: Collector) -> None:
    """Named by its route, with its status; the answer says which span it was, also when it is an error."""
    for body, status in ((CHAT, 200), ({**CHAT, "model": "none"}, 404)):
        headers = {"traceparent": PARENT, "X-Request-Id": f"traced-{status}"}
        answer = edges.http.post(f"{edges.endpoint.url}/chat/completions", json=body, headers=headers)
        _, trace, span, _ = answer.headers["traceparent"].split("-")
        shown = traces.span(span)
        said = {item.key: item.value for item in shown.attributes}

        assert (answer.status_code, answer.headers["x-request-id"]) == (status, f"traced-{status}")
        assert (trace, shown.parent_span_id.hex()) == (TRACE, "b7ad6b7169203331")
        assert shown.name == "POST /v1/chat/completions"
        assert said["http.response.status_code"].int_value == status


def test_a_packed_body_is_unpacked_within_bounds(edges: Deployment) -> None:
    """gzip alone; not more than a body may have, and no damaged one."""
    plain = json.dumps(CHAT).encode()
    bomb = gzip.compress(b'{"model": "tiny", "prompt": "' + b"x" * (65 << 20) + b'"}')
    sent = [
        (gzip.compress(plain), "gzip", 200),
        (plain, "identity", 200),
        (plain, "br", 415),
        (plain, "gzip", 400),
        (gzip.compress(plain)[:-9], "gzip", 400),
        (bomb, "gzip", 413),
    ]
    found = [
        edges.http.post(
            f"{edges.endpoint.url}/chat/completions",
            content=body,
            headers={"Content-Encoding": coding, "Content-Type": "application/json"},
        ).status_code
        for body, coding, _ in sent
    ]

    assert found == [status for _, _, status in sent]


def test_a_huge_prompt_is_refused_before_it_is_tokenized(edges: Deployment) -> None:
    """60 MB of text: a clear 400, within the seconds that it takes to send it; and 70 MB are no request at all."""
    base = edges.endpoint.url.removesuffix("/v1")
    content = json.dumps({**CHAT, "messages": [{"role": "user", "content": "word " * 12_000_000}]}).encode()
    answer = edges.http.post(f"{base}/v1/chat/completions", content=content)
    too_much = edges.http.post(f"{base}/v1/chat/completions", content=content + b" " * (10 << 20))
    page = edges.http.get(f"{base}/metrics").text
    active = next(line for line in page.splitlines() if line.startswith("baton_frontend_active_requests "))

    assert (answer.status_code, too_much.status_code) == (400, 413)
    assert "maximum context length is 4096 tokens" in answer.text
    assert float(active.split()[1]) == 1  # this very request


def test_a_cancelled_batch_ends_soon_and_keeps_what_was_done(edges: Deployment) -> None:
    """The answers so far are in its file, each once."""
    batch = _begun(edges, count=400)
    edges.client.batches.cancel(batch.id)
    cancelled = time.monotonic()
    batch = ended(edges, batch)
    assert batch.request_counts
    done = lines(edges, batch.output_file_id)

    assert time.monotonic() - cancelled < 10
    assert batch.status == "cancelled"
    assert 0 < batch.request_counts.completed < 400
    assert len({line["custom_id"] for line in done}) == len(done) == batch.request_counts.completed


def test_a_batch_outlives_its_process(edges: Deployment) -> None:
    """SIGKILL to the frontend in its midst: the next one goes on, and every request is answered once."""
    batch = _begun(edges, count=120)
    before = edges.pids()["frontend-0"]
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while edges.pids()["frontend-0"] == before or not _answers(edges):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    batch = ended(edges, edges.client.batches.retrieve(batch.id))
    done = lines(edges, batch.output_file_id)

    assert batch.status == "completed"
    assert sorted(line["custom_id"] for line in done) == sorted(f"r{number}" for number in range(120))


def _begun(edges: Deployment, count: int) -> Any:
    """A batch of which some requests are answered, and most are not."""
    bodies = (
        {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
        for number in range(count)
    )
    content = "\n".join(map(json.dumps, bodies)).encode()
    file = edges.client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = edges.client.batches.create(**of(file.id))
    output = edges.run.path / "batches" / batch.id / "output.jsonl"
    deadline = time.monotonic() + 30
    while not output.exists() or output.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return batch


def _answers(edges: Deployment) -> bool:
    try:
        return edges.http.get(edges.endpoint.url.removesuffix("/v1") + "/health").status_code == 200
    except httpx.TransportError:
        return False
