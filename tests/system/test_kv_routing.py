"""Real engines and what they cache: who gets a prompt, and what the frontend knows after losses.

Two aggregated workers share one deployment; of the nightly ones one has two prefill workers, the other two data-parallel ranks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments import Deployment, deployed
from tests.system.test_lifecycle import until

LONG = [100 + number % 1900 for number in range(1000)]


def ask(running: Deployment, prompt: list[int], **more: Any) -> int:
    """Have a prompt answered; returns how many of its tokens were cached."""
    headers = more.pop("headers", {})
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0} | more
    answer = running.http.post(f"{running.endpoint.url}/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def kv(running: Deployment, name: str, frontend: str = "frontend-0", **labels: str) -> float:
    """One of the frontend's metrics of KV routing."""
    return running.metric(frontend, f"baton_frontend_kv_{name}", **labels)


def health(running: Deployment) -> dict[str, str]:
    """What the frontend says of itself."""
    said: dict[str, str] = running.http.get(f"{running.endpoint.urls[0].removesuffix('/v1')}/health").json()
    return said


def clear(running: Deployment) -> None:
    """Have every worker drop its cache."""
    key = {"Authorization": f"Bearer {running.run.admin_key()}"}
    answer = httpx.post(f"{running.endpoint.url.removesuffix('/v1')}/admin/clear", headers=key, json={}, timeout=30)
    assert answer.status_code == 200, answer.text


def end(running: Deployment, member: str, signum: int = signal.SIGKILL) -> None:
    """Kill a process of rank 0 and wait until its agent has started another."""
    pid = running.pids()[member]
    os.kill(pid, signum)
    until(lambda: running.pids().get(member, pid) != pid, 20)


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two aggregated workers; the router that is the default there."""
    with deployed(
        tmp_path_factory.mktemp("kv"),
        "+recipe=tiny_agg",
        f"model.path=tiny:{tiny_model}",
        "roles.aggregated.replicas=2",
        name="kv",
    ) as running:
        yield running


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_real_engines_tell_what_they_cache(pair: Deployment) -> None:
    """A prompt's repeats find it; after a clear, of idle engines too, the frontend knows; a dead worker is forgotten."""
    assert health(pair) == {"status": "ready"}
    assert ask(pair, LONG) == 0
    until(lambda: kv(pair, "blocks", tier="device") >= 31, 5)
    hits = [ask(pair, LONG) for _ in range(4)]
    assert hits == [992] * 4
    assert kv(pair, "predicted_hit_tokens_total") == kv(pair, "hit_tokens_total") == 4 * 992

    other = [5 + number % 1900 for number in range(1000)]
    assert ask(pair, other) == 0
    assert ask(pair, other, cache_salt="mine") == 0, "another salt is another prompt"
    assert ask(pair, other, cache_salt="mine") == 992
    until(lambda: kv(pair, "blocks", tier="device") >= 93, 5)

    clear(pair)
    until(lambda: kv(pair, "blocks", tier="device") == 0, 5)
    assert ask(pair, LONG) == 0
    until(lambda: kv(pair, "blocks", tier="device") >= 31, 5)
    assert ask(pair, LONG) == 992


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_the_picture_is_whole_again_after_a_frontend_or_nats_was_killed(pair: Deployment) -> None:
    """Within five seconds of their return; while NATS is away requests go where they went before."""
    ask(pair, LONG)
    until(lambda: kv(pair, "blocks", tier="device") >= 31, 5)
    before = kv(pair, "blocks", tier="device")
    end(pair, "frontend-0")
    until(lambda: _same(pair, before), 8)
    assert ask(pair, LONG) == 992

    end(pair, "nats")
    assert ask(pair, LONG) == 992
    more = [700 + number for number in range(400)]
    assert ask(pair, more) == 0
    until(lambda: kv(pair, "blocks", tier="device") > before, 8)
    assert ask(pair, more) == 384
    assert health(pair) == {"status": "ready"}


def _same(running: Deployment, blocks: float) -> bool:
    try:
        return kv(running, "blocks", tier="device") == blocks and health(running) == {"status": "ready"}
    except httpx.TransportError:
        return False


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_prefills_go_where_their_prompts_are_cached(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The prefill worker that had the beginning is asked again; what decode caches for the most part it computes itself."""
    with deployed(
        tmp_path_factory.mktemp("split"),
        "+recipe=tiny_2p2d",
        f"model.path=tiny:{tiny_model}",
        "roles.decode.replicas=1",
        "frontend.local_prefill=short",
        "frontend.local_prefill_short_tokens=64",
        name="kvsplit",
        ready_s=360,
    ) as running:
        assert health(running) == {"status": "ready"}
        assert ask(running, LONG) == 0
        until(lambda: kv(running, "blocks", tier="device") >= 31, 5)
        for number in range(3):
            assert ask(running, [*LONG, *range(200 + number, 300 + number)]) == 992
        assert running.metric("frontend-0", "baton_frontend_local_prefills_total", reason="cached") == 0
        assert ask(running, LONG) == 992
        assert running.metric("frontend-0", "baton_frontend_local_prefills_total", reason="cached") == 1


@pytest.mark.engine
@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_ranks_are_chosen_by_what_each_caches(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A prompt that one rank was made to compute is sent to that rank, whichever it is."""
    with deployed(
        tmp_path_factory.mktemp("ranks"),
        "+recipe=tiny_dp2",
        f"model.path=tiny:{tiny_model}",
        name="kvranks",
        ready_s=360,
    ) as running:
        for rank in (0, 1):
            prompt = [100 + (number * (rank + 2)) % 1900 for number in range(500)]
            assert ask(running, prompt, headers={"x-data-parallel-rank": str(rank)}) == 0
            before = kv(running, "requests_total", dp_rank=str(rank))
            until(lambda: kv(running, "blocks", tier="device") >= 15, 5)
            until(lambda prompt=prompt: ask(running, prompt) == 480, 5)  # type: ignore[misc]
            assert [ask(running, prompt) for _ in range(3)] == [480] * 3
            assert kv(running, "requests_total", dp_rank=str(rank)) - before >= 4
