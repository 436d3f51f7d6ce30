"""Several frontends serve one port, and each one of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments import Deployment, deployed

FRONTENDS = ("frontend-0", "frontend-1")


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two frontends before an echo engine."""
    given = ("engine.backend=echo", f"model.path=tiny:{tiny_model}", "frontend.processes=2")
    with deployed(tmp_path_factory.mktemp("two"), "+recipe=tiny_agg", *given, name="two") as running:
        yield running


def served(two: Deployment, frontend: str) -> float:
    """Requests for completions that a frontend has answered."""
    return two.metric(frontend, "baton_frontend_requests_total", route="/v1/completions", status="200")


def test_connections_to_the_shared_port_reach_every_frontend(two: Deployment) -> None:
    """The kernel spreads them; both answer with the same key."""
    before = [served(two, name) for name in FRONTENDS]
    for _ in range(40):
        headers = {"Authorization": f"Bearer {two.run.api_key()}"}
        body = {"model": "tiny", "prompt": "one two", "max_tokens": 2}
        assert httpx.post(f"{two.endpoint.url}/completions", json=body, headers=headers).status_code == 200
    each = [served(two, name) - then for name, then in zip(FRONTENDS, before, strict=True)]

    assert sum(each) == 40
    assert min(each) > 0


def test_a_frontend_can_be_asked_by_itself(two: Deployment) -> None:
    """By the urls of the endpoint, in the order of their names; none of them is the shared one."""
    assert len({two.endpoint.url, *two.endpoint.urls}) == 3
    before = served(two, "frontend-1")
    for _ in range(5):
        body = {"model": "tiny", "prompt": "one two", "max_tokens": 2}
        assert two.http.post(f"{two.endpoint.urls[1]}/completions", json=body).status_code == 200

    assert served(two, "frontend-1") - before == 5


def limits(two: Deployment, url: str, **values: int) -> dict[str, Any]:
    """What a frontend says of the limits, after changing some."""
    headers = {"Authorization": f"Bearer {two.run.admin_key()}"}
    answer = two.http.post(f"{url.removesuffix('/v1')}/admin/limits", json=values, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait until it is so, while things may refuse to be asked."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.HTTPError, AssertionError):
            if condition():
                return
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def test_all_frontends_together_keep_a_limit_that_was_set_at_one(two: Deployment) -> None:
    """A key gets its requests a minute once, not once from each; a frontend that was killed comes back to the same limits."""
    first, second = two.endpoint.urls
    until(lambda: limits(two, first)["frontends"] == limits(two, second)["frontends"] == 2)
    limits(two, first, requests_per_minute=10)
    try:
        until(lambda: limits(two, second)["limits"]["requests_per_minute"] == 10)
        body = {"model": "tiny", "prompt": "one two", "max_tokens": 1}
        asked = [two.http.post(f"{url}/completions", json=body) for url in (first, second) for _ in range(8)]
        assert [answer.status_code for answer in asked] == [*[200] * 5, *[429] * 3] * 2
        assert "at this one of 2 frontends" in asked[-1].json()["error"]["message"]

        before = two.pids()["frontend-1"]
        os.kill(before, signal.SIGKILL)
        until(lambda: two.pids()["frontend-1"] != before and limits(two, second)["frontends"] == 2)
        assert limits(two, second)["limits"]["requests_per_minute"] == 10
        assert limits(two, second)["of_this_one"]["requests_per_minute"] == 5
    finally:
        limits(two, first, requests_per_minute=0)
