"""Routing by KV cache over many workers, with echo engines that pretend a cache: several frontends, losses, tools."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments import Deployment, deployed
from tests.system.test_kv_routing import ask, clear, end, health, kv
from tests.system.test_lifecycle import until

_fresh = itertools.count()


def prompt(tokens: int = 640) -> list[int]:
    """One that no test has used."""
    return [100 + next(_fresh) % 1900, *(100 + (next(_fresh) * 7) % 1900 for _ in range(tokens - 1))]


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Four workers and two frontends."""
    with deployed(
        tmp_path_factory.mktemp("fleet"),
        "+recipe=tiny_agg",
        f"model.path=tiny:{tiny_model}",
        "engine.backend=echo",
        "engine.echo_cache_blocks=400",
        "engine.echo_interval_s=0.01",
        "roles.aggregated.replicas=4",
        "frontend.processes=2",
        "control.lease_ttl_s=30",  # a frozen worker stays listed
        "frontend.router=kv",
        "frontend.router_sessions=true",
        "frontend.router_direct=true",
        name="fleet",
    ) as running:
        yield running


def post(running: Deployment, frontend: int, ids: list[int], **body: Any) -> httpx.Response:
    """A completion by one of the frontends."""
    headers = body.pop("headers", {})
    asked = {"model": "tiny", "prompt": ids, "max_tokens": 2} | body
    return running.http.post(f"{running.endpoint.urls[frontend]}/completions", json=asked, headers=headers)


def cached(answer: httpx.Response) -> int:
    """Tokens of the prompt that were cached."""
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def served(running: Deployment) -> Counter[str]:
    """Prompts that both frontends have sent to each worker."""
    found: Counter[str] = Counter()
    for frontend, number in itertools.product(("frontend-0", "frontend-1"), range(4)):
        name = f"aggregated-{number}"
        found[name] += int(kv(running, "requests_total", frontend, worker=name))
    return found


def test_what_one_frontend_sent_the_other_finds(fleet: Deployment) -> None:
    """At once, and without having seen the prompt before."""
    for _ in range(5):
        ids = prompt()
        assert cached(post(fleet, 0, ids)) == 0
        until(lambda ids=ids: kv(fleet, "changes_total", "frontend-1") >= kv(fleet, "changes_total", "frontend-0"), 5)  # type: ignore[misc]
        assert cached(post(fleet, 1, ids)) == 608


def test_one_load_picture_for_all_frontends(fleet: Deployment) -> None:
    """Long answers that one frontend has under way keep the other's new prompts away from their workers."""
    long = {"model": "tiny", "max_tokens": 3000, "stream": True}
    with contextlib.ExitStack() as stack:
        begun = []  # an iterator that nobody holds closes its stream
        for _ in range(3):
            asked = fleet.http.stream("POST", f"{fleet.endpoint.urls[0]}/completions", json=long | {"prompt": prompt()})
            begun.append(stack.enter_context(asked).iter_bytes())
            next(begun[-1])
        busy = {name for name in (f"aggregated-{n}" for n in range(4)) if fleet.metric(name, "baton_worker_streams")}
        assert len(busy) == 3
        (idle,) = {f"aggregated-{n}" for n in range(4)} - busy

        def goes_to_the_idle_one() -> bool:
            already = kv(fleet, "requests_total", "frontend-1", worker=idle)
            assert post(fleet, 1, prompt(64)).status_code == 200
            return kv(fleet, "requests_total", "frontend-1", worker=idle) == already + 1

        # The books travel by NATS, some 20 ms after what they tell of; once is by chance one time in four.
        until(lambda: all(goes_to_the_idle_one() for _ in range(3)), 15)
        assert [goes_to_the_idle_one() for _ in range(6)] == [True] * 6
    until(lambda: _streams(fleet) == 0, 10)


def test_a_conversation_about_a_picture_stays_where_it_was(fleet: Deployment) -> None:
    """Though only workers know the prompt's tokens; the other frontend finds it too, and other pictures go elsewhere."""

    def ask_about(picture: str, frontend: int, turns: int) -> tuple[int, str]:
        shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture * 40}"}}
        said = [{"role": "user", "content": [shown, {"type": "text", "text": "what is it"}]}]
        said += [{"role": "user", "content": f"and {turn} and so on and on"} for turn in range(turns)]
        before = served(fleet)
        body = {"model": "tiny", "messages": said, "max_tokens": 2}
        answer = fleet.http.post(f"{fleet.endpoint.urls[frontend]}/chat/completions", json=body)
        (worker,) = served(fleet) - before
        return cached(answer), worker

    hits, first = ask_about("picture", 0, 1)
    assert hits == 0
    for turns in range(2, 6):
        hits, worker = ask_about("picture", 0, turns)
        assert (hits > 0, worker) == (True, first)
    until(lambda: ask_about("picture", 1, 6)[1] == first, 10)  # the frontends' books travel by NATS
    assert ask_about("picture", 1, 7)[0] > 0
    assert len({ask_about(f"other {number}", 0, 1)[1] for number in range(6)}) > 1


def _streams(running: Deployment) -> float:
    return sum(running.metric(f"aggregated-{number}", "baton_worker_streams") for number in range(4))


def test_sessions_stay_and_names_are_followed(fleet: Deployment) -> None:
    """A session keeps one worker over different prompts; a named worker serves, and one that is not there is an error."""
    before = served(fleet)
    for _ in range(8):
        post(fleet, 0, prompt(64), headers={"x-session-id": "mine"})
    assert [count for count in (served(fleet) - before).values() if count] == [8]

    before = served(fleet)
    for number in range(4):
        post(fleet, 1, prompt(64), headers={"x-baton-worker": f"aggregated-{number}"})
    assert set((served(fleet) - before).values()) == {1}
    refused = post(fleet, 1, prompt(64), headers={"x-baton-worker": "aggregated-7"})
    assert refused.status_code == 503
    assert "aggregated-7" in refused.json()["error"]["message"]


def test_a_lost_worker_is_forgotten_and_its_successor_begins_empty(fleet: Deployment) -> None:
    """Its blocks leave the index; prompts that it had are computed elsewhere."""
    ids = prompt()
    post(fleet, 0, ids)
    until(lambda: kv(fleet, "blocks", tier="device") >= 20, 5)
    owner = next(n for n in range(4) if cached(post(fleet, 0, ids, headers={"x-baton-worker": f"aggregated-{n}"})))
    clear(fleet)
    until(lambda: kv(fleet, "blocks", tier="device") == 0, 5)
    post(fleet, 0, ids, headers={"x-baton-worker": f"aggregated-{owner}"})
    until(lambda: kv(fleet, "blocks", tier="device") == 20, 5)
    end(fleet, f"aggregated-{owner}")
    until(lambda: kv(fleet, "blocks", tier="device") == 0, 10)
    until(lambda: health(fleet) == {"status": "ready"}, 20)

    assert cached(post(fleet, 0, ids)) == 0


def test_a_hundred_lost_messages_are_made_good(fleet: Deployment) -> None:
    """A frontend that is frozen while much happens has the whole picture when it goes on, whatever NATS kept for it."""
    pid = fleet.pids()["frontend-1"]
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(30):
            post(fleet, 0, prompt(96))
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: kv(fleet, "blocks", "frontend-1", tier="device") == kv(fleet, "blocks", tier="device"), 6)


def test_a_worker_that_should_tell_and_cannot_keeps_the_deployment_from_being_ready(fleet: Deployment) -> None:
    """A frozen worker tells nothing: health names it, the metrics count it, and it comes back by itself."""
    pid = fleet.pids()["aggregated-2"]
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: kv(fleet, "untold_workers") == 1, 10)
        assert "aggregated-2 rank 0 tells no more which KV blocks it caches" in health(fleet)["reason"]
        assert health(fleet)["status"] == "degraded"
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: health(fleet) == {"status": "ready"}, 10)


def test_prompts_are_prefilled_where_they_are_cached(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With prefill and decode apart; and what a decode worker caches for the most part it computes itself."""
    with deployed(
        tmp_path_factory.mktemp("split"),
        "+recipe=tiny_2p2d",
        f"model.path=tiny:{tiny_model}",
        "engine.backend=echo",
        "engine.echo_cache_blocks=400",
        "frontend.router=kv",
        "frontend.local_prefill=short",
        "frontend.local_prefill_short_tokens=64",
        name="split",
    ) as running:
        ids = prompt()
        assert ask(running, ids) == 0
        until(lambda: kv(running, "blocks", tier="device") == 20, 5)
        more = [*ids, *prompt(128)]
        assert ask(running, more) == 640, "the prefill worker that had it was asked again"
        until(lambda: kv(running, "blocks", tier="device") == 24, 5)
        before = running.metric("frontend-0", "baton_frontend_legs_total", kind="prefill")
        assert ask(running, more) == 736
        assert running.metric("frontend-0", "baton_frontend_legs_total", kind="prefill") == before
        assert running.metric("frontend-0", "baton_frontend_local_prefills_total", reason="cached") == 1
