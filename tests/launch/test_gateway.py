"""The gateway passes bytes through, follows the deployment, and asks again only while the client has seen nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from launch.compose import read
from launch.gateway import POLL_S, Target, opened, target
from launch.plan import plan
from launch.recipe import Launcher
from launch.records import Endpoint, Job, Phase, RunDirectory
from tests.deployments import Deployment
from tests.reference import complete

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nX-Said: twice\r\nContent-Length: 5\r\n\r\nhello"
REFUSED = json.dumps({"error": {"message": "the deployment is stopping: http://x/v1 serves instead"}}).encode()
DRAINING = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\nRetry-After: 5\r\n\r\n%b" % (
    len(REFUSED),
    REFUSED,
)
BUSY = b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 32\r\n\r\n{"error":{"message":"overload"}}'


class Origin:
    """A server that does what a test wants with each connection, and keeps what it was sent."""

    def __init__(self, *acts: bytes | None) -> None:
        self._acts = list(acts)
        self.heads: list[bytes] = []
        self.url = ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a request; send the next act, or cut the connection where that is None. The last act is repeated."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            length = next(
                (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
            )
            await reader.readexactly(length)
            act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
            if act is None:
                writer.transport.abort()
                return
            writer.write(act)
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def listening(origin: Origin) -> AsyncIterator[Origin]:
    """The server, on a free port."""
    server = await asyncio.start_server(origin, "127.0.0.1", 0)
    origin.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with server:
        yield origin


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """The run directory of a deployment whose endpoint tests decide."""
    directory, recipe = RunDirectory(tmp_path / "runs" / "mine"), read(["+recipe=tiny_agg"]).recipe
    directory.prepare(recipe, plan(recipe), 1)
    directory.put_job(Job(launcher=Launcher.LOCAL, attempt=1, id="1", host="h", submitted_at=0.0))
    return directory


def publish(run: RunDirectory, url: str, state: Phase = Phase.READY) -> None:
    """Write endpoint.json."""
    run.put_endpoint(Endpoint(url=url, urls=[url], models=["m"], state=state, api_key_file="k"))


@contextlib.asynccontextmanager
async def gateway(run: RunDirectory, wait_s: float = 10) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway, and a client of it."""
    async with (
        opened(run.path, None, "127.0.0.1", 0, wait_s) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        yield client


async def seen() -> None:
    """Give the gateway the time that it may take to see another endpoint."""
    await asyncio.sleep(4 * POLL_S)


async def test_a_request_without_an_answer_is_sent_again_and_passes_whole(run: RunDirectory) -> None:
    """The old endpoint refuses because it drains, cuts the connection, or is gone; the new one gets the same request, with the
    client's key, query and body, and its answer comes back as it is. Another 503 is an answer like any other."""
    async with (
        listening(Origin(DRAINING, None, ANSWER, ANSWER)) as old,
        listening(Origin(ANSWER, BUSY)) as new,
        gateway(run) as client,
    ):
        publish(run, old.url)
        first = await client.post("/chat?a=%2Fb", content=b"x" * 3000, headers={"Authorization": "Bearer mine"})
        publish(run, "http://127.0.0.1:9/v1")  # nobody listens there
        await seen()
        waiting = asyncio.create_task(client.get("/models"))
        await seen()
        publish(run, new.url)
        second = await waiting
        busy = await client.get("/models")

    assert (first.status_code, first.text, first.headers["x-said"]) == (200, "hello", "twice")
    assert len(old.heads) == 3
    for head in old.heads:
        assert head.startswith(b"POST /v1/chat?a=%2Fb HTTP/1.1\r\n")
        assert b"Authorization: Bearer mine\r\n" in head
        assert b"Content-Length: 3000\r\n" in head
    assert second.text == "hello"
    assert (busy.status_code, busy.json()) == (503, {"error": {"message": "overload"}})
    assert len(new.heads) == 2


async def test_an_answer_that_breaks_off_is_not_asked_for_again(run: RunDirectory) -> None:
    """The client has seen a part of it: it sees the cut, and the endpoint no second request."""
    begun = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nthe beginning"
    async with listening(Origin(begun)) as origin, gateway(run) as client:
        publish(run, origin.url)
        with pytest.raises(httpx.TransportError):
            await client.get("/models")
        await seen()

    assert len(origin.heads) == 1


async def test_a_request_that_cuts_every_connection_is_given_up(run: RunDirectory) -> None:
    """Else one request would bring down a frontend again and again."""
    async with listening(Origin(None)) as origin, gateway(run) as client:
        publish(run, origin.url)
        answer = await client.post("/completions", content=b"{}")

    assert answer.status_code == 503
    assert len(origin.heads) == 4


async def test_nothing_that_serves_is_said_in_the_shape_of_openai(run: RunDirectory) -> None:
    """At once where nothing is to come, after the wait where it might; with the reason and when to come back."""
    async with gateway(run, wait_s=0.5) as client:
        absent = await client.get("/models")
        publish(run, "http://127.0.0.1:9/v1", Phase.STOPPED)
        await seen()
        stopped = await client.get("/models")
        publish(run, "http://127.0.0.1:9/v1")
        await seen()
        dead = await client.get("/models")

    assert [answer.status_code for answer in (absent, stopped, dead)] == [503] * 3
    assert stopped.json()["error"] == {
        "message": "mine is stopped: try again later",
        "type": "service_unavailable_error",
        "param": None,
        "code": 503,
    }
    assert stopped.headers["retry-after"] == "5"
    assert "does not answer" in dead.json()["error"]["message"]


@pytest.mark.parametrize(
    ("state", "more", "where"),
    [
        pytest.param(Phase.READY, False, Target("http://a:1"), id="ready"),
        pytest.param(Phase.DEGRADED, False, Target("http://a:1"), id="degraded"),
        pytest.param(Phase.STARTING, False, Target(None, "d is starting"), id="starting"),
        pytest.param(Phase.DRAINING, False, Target(None, "d is draining", hope=False), id="draining"),
        pytest.param(Phase.STOPPED, True, Target(None, "d is stopped"), id="gap-in-a-chain"),
        pytest.param(Phase.STOPPED, False, Target(None, "d is stopped", hope=False), id="stopped"),
    ],
)
def test_requests_wait_where_somebody_may_serve_them(state: Phase, more: bool, where: Target) -> None:
    """A deployment that ends is not waited for, unless it is a chain."""
    said = Endpoint(url="http://a:1/v1", urls=[], models=[], state=state, api_key_file="k")

    assert target(said, "d", more) == where


async def test_a_client_that_leaves_is_cancelled_behind_the_gateway(echo: Deployment) -> None:
    """And streams and errors of a real deployment are those that it gives."""
    async with gateway(echo.run) as client:
        base = str(client.base_url)
        with OpenAI(base_url=base, api_key=echo.run.api_key(), max_retries=0) as asking:
            answers = await asyncio.to_thread(lambda: [complete(asking, "hello", stream) for stream in (False, True)])
        idle = echo.metric("frontend-0", "baton_frontend_active_requests")  # which counts the asking
        strange = await client.get("/models", headers={"Authorization": "Bearer wrong"})
        body = {"model": "tiny", "prompt": "x", "max_tokens": 3900, "stream": True, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {echo.run.api_key()}"}
        async with client.stream("POST", "/completions", json=body, headers=headers) as stream:
            await anext(stream.aiter_lines())
            during = echo.metric("frontend-0", "baton_frontend_active_requests")
        for _ in range(100):
            if echo.metric("frontend-0", "baton_frontend_active_requests") == idle:
                break
            await asyncio.sleep(0.1)

    assert [answer.completion_tokens for answer in answers] == [40, 40]
    assert strange.status_code == 401
    assert during == idle + 1
    assert echo.metric("frontend-0", "baton_frontend_active_requests") == idle


def test_connect_says_how_to_reach_what_serves(echo: Deployment) -> None:
    """The tunnel through the host that was named to the endpoint, and a request that goes to the near end of it."""
    argv = [sys.executable, "-m", "launch.connect", echo.run.name, "--runs-dir", str(echo.run.path.parent)]
    done = subprocess.run(
        [*argv, "--via", "login.example.org", "--port", "8123"], check=True, capture_output=True, text=True, timeout=60
    )
    there = echo.endpoint.url.removeprefix("http://").removesuffix("/v1")

    assert f"-L 127.0.0.1:8123:{there} login.example.org" in done.stdout
    assert "curl -s http://127.0.0.1:8123/v1/chat/completions" in done.stdout
    assert echo.run.api_key() not in done.stdout
