"""One fault at a time, under load: no request fails, nobody else goes down, and the deployment is whole again in time."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from launch.records import MemberRecord, Phase, State
from tests.chaos.asks import Asks
from tests.chaos.clients import Clients, End
from tests.chaos.faults import Faults, can_cut, frozen
from tests.deployments import Deployment, deployed
from tests.system.test_lifecycle import until

WHOLE_S = 5.0
CLIENTS = 6
STALL_S = 5.0


@pytest.fixture(scope="module")
def running(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two prefill and two decode workers with echo engines, and two frontends."""
    with deployed(
        tmp_path_factory.mktemp("faults"),
        *("+recipe=tiny_2p2d", "engine.backend=echo", "engine.echo_interval_s=0.02", f"model.path=tiny:{tiny_model}"),
        *("frontend.processes=2", f"frontend.stall_timeout_s={STALL_S}"),
        name="faults",
    ) as found:
        yield found


@pytest.mark.parametrize(
    "fault",
    [
        *(
            pytest.param(name, marks=pytest.mark.nightly)  # the short storm of tests/chaos has them too
            for name in ("kill NATS", "kill etcd", "kill a worker", "stop a worker with SIGTERM")
        ),
        "wipe etcd's data",
        "kill NATS and etcd",
        pytest.param(
            "cut the connections of a worker",
            marks=pytest.mark.skipif(not can_cut(), reason="needs root and iproute2 to break connections of others"),
        ),
        "kill a frontend",
    ],
)
async def test_a_fault_fails_no_request_and_is_over_soon(running: Deployment, tiny_model: Path, fault: str) -> None:
    """Every answer is whole and right; every process but the victim lives on; all is known again 5 s after its return."""
    faults = Faults(running, seed=len(fault))
    urls = [url.removesuffix("/v1") for url in running.endpoint.urls]
    clients = Clients(Asks(tiny_model, len(fault)), urls, running.run.api_key(), faults.ledger.was_down)
    quiet, before = asyncio.Event(), running.pids()
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run(CLIENTS, quiet))
        await asyncio.sleep(0.5)
        done = await faults.do(fault)
        await asyncio.sleep(0.5)
        quiet.set()
    print(f"{fault} ({done.victim}): whole after {done.whole_s:.2f} s, {dict(clients.tally.ends)}")

    assert clients.tally.problems == []
    assert faults.ledger.problems == []
    assert clients.tally.ends[End.RIGHT] > 0
    assert done.whole_s < WHOLE_S
    changed = {name for name, pid in running.pids().items() if pid != before[name]}
    assert changed <= set(done.victim.split(" and "))


def test_a_frontend_that_starts_while_etcd_is_away_asks_the_workers_known_before(running: Deployment) -> None:
    """It has no other way to learn of them."""
    until(lambda: whole(running))
    before = running.pids()["frontend-1"]
    kept = running.run.path / "control" / "workers-1-frontend-1.json"
    until(lambda: kept.exists() and len(json.loads(kept.read_text())) == 4)
    with frozen([running.pids()["etcd"]]):
        os.kill(before, signal.SIGKILL)
        until(lambda: running.pids()["frontend-1"] not in (0, before))
        until(lambda: answers(running, running.endpoint.urls[1]), 10)
    until(lambda: whole(running))


@pytest.mark.nightly
def test_a_worker_that_starts_while_etcd_is_away_serves_once_it_is_back(running: Deployment) -> None:
    """Nobody learns of it before: others answer meanwhile, its agent does not take it for ready, and it is there in 5 s."""
    until(lambda: whole(running))
    before, served = running.pids()["decode-1"], 0
    with frozen([running.pids()["etcd"]]):
        os.kill(before, signal.SIGKILL)
        until(lambda: running.pids()["decode-1"] not in (0, before), 30)
        ends = time.monotonic() + 8
        while time.monotonic() < ends:
            assert answers(running, running.endpoint.url)
            assert member(running, "decode-1").state is not State.READY
            served += 1
    back = time.monotonic()
    until(lambda: member(running, "decode-1").state is State.READY and whole(running))

    assert served > 10
    assert time.monotonic() - back < WHOLE_S


def member(running: Deployment, name: str) -> MemberRecord:
    """What the agents say of a member."""
    return next(rank.members[name] for rank in running.run.ranks(1).values() if name in rank.members)


def answers(running: Deployment, url: str) -> bool:
    """Whether a completion asked for there is answered."""
    try:
        return running.http.post(f"{url}/completions", json={"model": "tiny", "prompt": "a"}).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.nightly
async def test_an_etcd_that_is_frozen_for_long_fails_no_request(running: Deployment, tiny_model: Path) -> None:
    """30 s, past every lease: workers are asked from the last known view, and are known again within 5 s of its return."""
    faults = Faults(running, seed=30)
    urls = [url.removesuffix("/v1") for url in running.endpoint.urls]
    clients = Clients(Asks(tiny_model, 30), urls, running.run.api_key(), faults.ledger.was_down)
    quiet, before = asyncio.Event(), running.pids()
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run(CLIENTS, quiet))
        with frozen([before["etcd"]]):
            await asyncio.sleep(30)
        returned = time.monotonic()
        while not await faults.known():
            await asyncio.sleep(0.1)
        known_s = time.monotonic() - returned
        quiet.set()
    print(f"known again after {known_s:.2f} s, {dict(clients.tally.ends)}")

    assert clients.tally.problems == []
    assert known_s < WHOLE_S
    assert running.pids() == before


def test_a_frozen_worker_costs_a_stream_no_token_and_comes_back(running: Deployment) -> None:
    """SIGSTOP in mid stream: the stream goes on elsewhere within the stall timeout; the worker is asked again once it answers."""
    until(lambda: whole(running))
    body = {"model": "tiny", "prompt": list(range(40, 60)), "max_tokens": 100, "stream": True}
    moments, ids = [], []
    with running.http.stream("POST", f"{running.endpoint.url}/completions", json=body) as response:
        lines = response.iter_lines()
        for line in lines:
            if not line.startswith("data: {"):
                continue
            moments.append(time.monotonic())
            ids.append(json.loads(line[6:])["choices"][0]["text"])
            if len(moments) == 10:
                victim = next(name for name in ("decode-0", "decode-1") if streams(running, name))
                os.kill(running.pids()[victim], signal.SIGSTOP)
    gap = max(after - before for before, after in itertools.pairwise(moments))
    left = usable(running, "decode")
    os.kill(running.pids()[victim], signal.SIGCONT)
    back_s = until(lambda: usable(running, "decode") == 2)
    print(f"gap {gap:.2f} s, back after {back_s:.2f} s")
    undisturbed = running.client.completions.create(model="tiny", prompt=list(range(40, 60)), max_tokens=100)

    assert "".join(ids) == undisturbed.choices[0].text
    assert len(ids) == 100
    assert left == 1
    assert gap < STALL_S + 1


def test_a_killed_idle_worker_leaves_the_routing_within_a_second(running: Deployment) -> None:
    """By its broken connection, and not by its lease; `benchmarks.reliability.idle_kills` has the distribution."""
    until(lambda: whole(running))
    os.kill(running.pids()["prefill-1"], signal.SIGKILL)
    seconds = until(lambda: usable(running, "prefill") == 1, 5)

    assert seconds < 1


def test_a_stream_that_nobody_can_save_ends_with_an_error_and_done(running: Deployment) -> None:
    """In OpenAI's shape, at once, and never by a silence."""
    until(lambda: whole(running))
    body = {"model": "tiny", "prompt": "to the end", "max_tokens": 1000, "stream": True}
    seen = []
    with running.http.stream("POST", f"{running.endpoint.url}/completions", json=body) as response:
        for line in filter(None, response.iter_lines()):
            seen.append(line)
            if len(seen) == 5:
                pids = running.pids()
                for name in ("decode-0", "decode-1"):
                    os.kill(pids[name], signal.SIGKILL)
                killed = time.monotonic()
    took_s = time.monotonic() - killed
    until(lambda: whole(running), 30)

    assert json.loads(seen[-2].removeprefix("data: "))["error"]["code"] == 503
    assert seen[-1] == "data: [DONE]"
    assert took_s < 2


def whole(running: Deployment) -> bool:
    """Whether the deployment says that it is ready, and each frontend that nobody is missing."""
    endpoint = running.run.endpoint()
    if endpoint is None or endpoint.state is not Phase.READY:
        return False
    try:
        pages = [httpx.get(f"{url.removesuffix('/v1')}/health") for url in endpoint.urls]
    except httpx.TransportError:
        return False
    counts = [usable(running, kind, f"frontend-{index}") for index in range(2) for kind in ("prefill", "decode")]
    return counts == [2] * 4 and all(page.json() == {"status": "ready"} for page in pages)


def usable(running: Deployment, kind: str, frontend: str = "frontend-0") -> int:
    """Workers of a kind that a frontend would ask now."""
    return int(running.metric(frontend, "baton_frontend_usable_workers", kind=kind))


def streams(running: Deployment, member: str) -> int:
    """Requests that a worker is serving."""
    return int(running.metric(member, "baton_worker_streams"))
