"""Several frontends serve one port, and each one of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
