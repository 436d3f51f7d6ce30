"""Clients that leave, a thousand of them and at every moment, cost nothing that stays: no KV block, no stream, no engine."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deployments import Deployment, deployed
from tests.reference import WORDS, Reference, ask_all, complete

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

REQUESTS = 1000
AT_ONCE = 24
LEASE_S = 8


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, reference: Reference
) -> Iterator[Deployment]:
    """One prefill and one decode engine; a short lease, since that is what bounds the one race that only it can end."""
    shape = ("+recipe=tiny_disagg", f"engine.kv_lease_s={LEASE_S}", f"model.path=tiny:{tiny_model}")
    with deployed(tmp_path_factory.mktemp("cancelled"), *shape, name="cancelled") as running:
        yield running


async def test_a_thousand_cancelled_requests_leave_nothing(deployment: Deployment, reference: Reference) -> None:
    """Before prefill, during it, between the legs, during the pull and in decode; then all blocks of both engines are free
    again, the same processes serve, and they answer what plain vLLM answers: nobody's blocks became another's."""
    before = deployment.pids()
    ends = await storm(deployment)
    members = ("prefill-0", "decode-0")
    seconds = await free_again(deployment, members)
    answers = ask_all(deployment.client, reference.prompts[:24], complete, True)

    assert ends["left before the first byte"] > REQUESTS / 10
    assert ends["left in mid stream"] > REQUESTS / 10
    assert set(ends) <= {"left before the first byte", "left in mid stream", "answered"}, ends
    assert seconds < LEASE_S + 5
    assert deployment.pids() == before
    assert answers == reference.completions[:24]
    for member in members:
        assert deployment.metric(member, "baton_worker_streams") == 0
        assert deployment.metric(member, "baton_worker_nixl_notifications_after_expiry_total") == 0


async def storm(deployment: Deployment, seed: int = 11) -> Counter[str]:
    """Send the requests, and leave each at a random moment; returns how they ended."""
    rng = random.Random(seed)
    plans = [(prompt(rng), *patience(rng)) for _ in range(REQUESTS)]
    ends: Counter[str] = Counter()
    left = iter(plans)
    headers = {"Authorization": f"Bearer {deployment.run.api_key()}"}
    async with httpx.AsyncClient(base_url=deployment.endpoint.url, headers=headers, timeout=60) as http:

        async def client() -> None:
            for text, patience_s, events in left:
                ends[await ask_and_leave(http, text, patience_s, events)] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(client())
    return ends


def patience(rng: random.Random) -> tuple[float, int]:
    """Seconds, and events of the stream, after which a client leaves; whichever comes first."""
    if rng.random() < 0.5:
        return rng.choice((0.02, 0.05, 0.1, 0.3, 1.0)) * 2 * rng.random(), 1000
    return 60.0, rng.randint(1, 62)


def prompt(rng: random.Random) -> str:
    """Of 1 to 900 words, mostly short; no two alike."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice((3, 30, 100, 300, 900))))


async def ask_and_leave(http: httpx.AsyncClient, text: str, patience_s: float, events: int) -> str:
    """One request, given up when the time is over or so many events have come; says how it ended."""
    body = {"model": "tiny", "prompt": text, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
    count = 0
    try:
        async with asyncio.timeout(patience_s), http.stream("POST", "/completions", json=body) as response:
            if response.status_code != 200:
                return f"status {response.status_code}: {(await response.aread())[:200]!r}"
            last = ""
            async for line in response.aiter_lines():
                last = line or last
                count += bool(line)
                if count == events:
                    raise TimeoutError
            return "answered" if last == "data: [DONE]" else f"ended with {last}"
    except TimeoutError:
        return "left in mid stream" if count else "left before the first byte"


async def free_again(deployment: Deployment, members: tuple[str, ...]) -> float:
    """Seconds until no member holds a KV block, by its engine's own count after one more request."""
    begun = time.monotonic()
    while True:
        await asyncio.to_thread(complete, deployment.client, f"and now {time.monotonic()}", False)
        held = {member: deployment.metric(member, "baton_worker_kv_usage_ratio") for member in members}
        if not any(held.values()):
            return time.monotonic() - begun
        assert time.monotonic() - begun < 60, held
        await asyncio.sleep(0.5)
