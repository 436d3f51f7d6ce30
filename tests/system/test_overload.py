"""Load beyond what the workers can do, and clients that read or send too slowly: the others never notice."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments import Deployment, deployed

SLOTS, INTERVAL_S = 4, 0.02


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """An echo engine that runs four requests at once, behind a short queue and strict connections."""
    given = (
        *("engine.backend=echo", f"model.path=tiny:{tiny_model}"),
        *(f"engine.echo_interval_s={INTERVAL_S}", f"engine.echo_slots={SLOTS}"),
        *(f"frontend.busy_requests={SLOTS}", "frontend.queue_requests=4", "frontend.max_unsent_bytes=20000"),
        *("frontend.request_timeout_s=1", "frontend.keep_alive_s=2", "frontend.reader_timeout_s=2"),
    )
    with deployed(tmp_path_factory.mktemp("small"), "+recipe=tiny_agg", *given, name="small") as running:
        yield running


def ask(small: Deployment, tokens: int, **more: Any) -> httpx.Response:
    """A unary completion."""
    body = {"model": "tiny", "prompt": "one two three", "max_tokens": tokens, **more}
    return small.http.post(f"{small.endpoint.url}/completions", json=body)


def limits(small: Deployment, **values: float) -> httpx.Response:
    """Change limits of load with the operators' key."""
    base = small.endpoint.url.removesuffix("/v1")
    headers = {"Authorization": f"Bearer {small.run.admin_key()}"}
    return small.http.post(f"{base}/admin/limits", json=values, headers=headers)


def until(condition: Any, timeout_s: float = 15) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def test_what_does_not_fit_is_refused_at_once(small: Deployment) -> None:
    """Four run, four wait, the rest is told when to come again; all that were let in are answered."""

    def timed(_: int) -> tuple[httpx.Response, float]:
        begun = time.monotonic()
        return ask(small, 100), time.monotonic() - begun

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(timed, range(24)))
    refused = [(answer, took_s) for answer, took_s in answers if answer.status_code == 503]
    served = [answer for answer, _ in answers if answer.status_code == 200]

    assert len(served) == 2 * SLOTS
    assert len(served) + len(refused) == 24
    assert all(int(answer.headers["retry-after"]) >= 1 for answer, _ in refused)
    assert all("overloaded" in answer.json()["error"]["message"] for answer, _ in refused)
    assert max(took_s for _, took_s in refused) < 100 * INTERVAL_S  # none waited for an answer to end
    assert ask(small, 1).status_code == 200


def test_a_request_does_not_wait_for_ever(small: Deployment) -> None:
    """It is refused when its time in the queue is over."""
    limits(small, queue_timeout_s=0.3)
    try:
        with ThreadPoolExecutor(SLOTS) as pool:
            running = [pool.submit(ask, small, 100) for _ in range(SLOTS)]
            until(lambda: small.metric("aggregated-0", "baton_worker_streams") == SLOTS)
            refused = ask(small, 1)
            assert [item.result().status_code for item in running] == [200] * SLOTS
    finally:
        limits(small, queue_timeout_s=30)

    assert refused.status_code == 503
    assert "within 0.3 s" in refused.json()["error"]["message"]


def test_a_key_over_its_rate_is_told_what_it_has_left(small: Deployment) -> None:
    """429 with Retry-After; every answer has the headers that OpenAI's clients read."""
    assert limits(small, requests_per_minute=3).json()["limits"]["requests_per_minute"] == 3
    try:
        answers = [ask(small, 1) for _ in range(4)]
    finally:
        limits(small, requests_per_minute=0)

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20
    assert answers[3].json()["error"]["type"] == "rate_limit_error"
    assert "x-ratelimit-limit-requests" not in ask(small, 1).headers


def test_operators_change_limits_with_one_command(small: Deployment) -> None:
    """Of all frontends; a wrong name or value changes nothing and says what would do."""
    command = [sys.executable, "-m", "launch.ctl", "small", "limits", f"--runs-dir={small.run.path.parent}"]
    changed = subprocess.run([*command, "queue_tokens=1000"], capture_output=True, text=True, check=False)
    wrong = subprocess.run([*command, "queue_token=5"], capture_output=True, text=True, check=False)
    limits(small, queue_tokens=0)

    assert '"queue_tokens": 1000' in changed.stdout
    assert wrong.returncode == 1
    assert "queue_tokens" in wrong.stderr
    assert limits(small, busy_requests=-1).status_code == 400


def open_stream(small: Deployment, tokens: int) -> socket.socket:
    """A connection with a small window on which a stream was asked for."""
    host, _, port = small.endpoint.url.removeprefix("http://").removesuffix("/v1").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    body = json.dumps({"model": "tiny", "prompt": "one two three", "max_tokens": tokens, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {small.run.api_key()}\r\n"
    connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return connection


@pytest.fixture(scope="module")
def fast(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """An echo engine at full speed behind a frontend that keeps little for slow readers."""
    given = (
        *("engine.backend=echo", f"model.path=tiny:{tiny_model}", "engine.echo_interval_s=0.002"),
        *("frontend.max_unsent_bytes=50000", "frontend.reader_timeout_s=2"),
    )
    with deployed(tmp_path_factory.mktemp("fast"), "+recipe=tiny_agg", *given, name="fast") as running:
        yield running


def test_two_hundred_slow_readers_cost_the_others_nothing(fast: Deployment) -> None:
    """They are cut, their requests end at the worker, and memory stays bounded, while others get whole answers."""
    pid = fast.pids()["frontend-0"]
    before = resident_bytes(pid)
    slow = [open_stream(fast, 4000) for _ in range(200)]
    try:
        until(lambda: fast.metric("aggregated-0", "baton_worker_streams") > 150)
        whole = [ask(fast, 50).json()["usage"]["completion_tokens"] for _ in range(20)]
        until(lambda: fast.metric("aggregated-0", "baton_worker_streams") == 0, timeout_s=90)
        grown = resident_bytes(pid) - before
    finally:
        for connection in slow:
            connection.close()

    assert whole == [50] * 20
    assert fast.metric("frontend-0", "baton_frontend_cut_connections_total") == 200
    assert grown < 200 * (50_000 + (64 << 10) + 100_000)


def test_a_reader_that_is_slow_but_steady_is_served(fast: Deployment) -> None:
    """What it takes in its own time is whole."""
    connection = open_stream(fast, 600)
    got = b""
    while not got.endswith(b"0\r\n\r\n"):
        part = connection.recv(4096)
        assert part, "the connection was cut"
        got += part
        time.sleep(0.02)
    connection.close()

    assert got.count(b'"text"') == 600
    assert b"[DONE]" in got


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.fixture
def raw(small: Deployment) -> Iterator[socket.socket]:
    """A plain connection."""
    host, _, port = small.endpoint.url.removeprefix("http://").removesuffix("/v1").partition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        yield connection


def test_a_request_that_trickles_in_is_answered_and_closed(small: Deployment, raw: socket.socket) -> None:
    """However steadily its head comes."""
    done = threading.Event()

    def trickle() -> None:
        with raw.makefile("wb", buffering=0) as out:
            out.write(b"GET /live HTTP/1.1\r\n")
            while not done.wait(0.1):
                try:
                    out.write(b"X: y\r\n")
                except OSError:
                    return

    sender = threading.Thread(target=trickle)
    sender.start()
    try:
        got = raw.recv(1000)
    finally:
        done.set()
        sender.join()

    assert got.startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_is_closed(raw: socket.socket) -> None:
    """Also after it was used."""
    raw.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
    assert raw.recv(1000).startswith(b"HTTP/1.1 200 ")
    begun = time.monotonic()

    assert raw.recv(1000) == b""
    assert time.monotonic() - begun > 1
