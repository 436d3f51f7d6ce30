"""A node that dies takes its own members only, whichever it is: another rank leads on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from openai import OpenAI

from launch.records import Endpoint, Phase, RunDirectory
from slurm.children import group_members
from tests.deployments import deployed, processes_of
from tests.reference import complete

NODES = ("+recipe=tiny_2p2d", "engine.backend=echo", "cluster.cpu_engines_per_node=1")


def until(condition: Callable[[], bool], timeout_s: float = 60) -> float:
    """Wait for it, or fail; returns the seconds that it took."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < timeout_s, "it did not happen in time"
        time.sleep(0.05)
    return time.monotonic() - begun


def endpoint_of(run: RunDirectory) -> Endpoint:
    """What the deployment says of itself now."""
    endpoint = run.endpoint()
    assert endpoint
    return endpoint


def client(run: RunDirectory) -> OpenAI:
    """The official client, pointed at whoever leads."""
    return OpenAI(base_url=endpoint_of(run).url, api_key=run.api_key(), max_retries=0, timeout=30)


def kill_node(run: RunDirectory, rank: int) -> None:
    """SIGKILL the agent of a rank and all that it started, as the loss of its node does."""
    record = run.ranks(1)[rank]
    groups = [member.pid for member in record.members.values()]
    for pid in (record.pid, *(pid for group in groups for pid in group_members(group))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def standing_by(run: RunDirectory) -> bool:
    """Whether the frontends of ranks 1 and 2 serve as well."""
    ranks = run.ranks(1)
    found = [ranks[rank].members.get(f"frontend-0.{rank}") for rank in (1, 2)]
    return all(member is not None and member.state == "ready" for member in found)


def test_another_rank_leads_when_rank_0_is_gone(tmp_path: Path, tiny_model: Path) -> None:
    """Its agent and all its processes are killed: requests at the new endpoint are answered by the members that are left,
    the lost rank is named, and the stop leaves nothing behind.
    """
    with deployed(tmp_path, *NODES, f"model.path=tiny:{tiny_model}", name="moved") as running:
        run, before = running.run, running.endpoint
        until(lambda: standing_by(run))
        kill_node(run, 0)
        moved_s = until(lambda: endpoint_of(run).head != 0)
        with client(run) as asking:
            answers = [complete(asking, f"after it {i}", bool(i % 2)) for i in range(8)]
        after = endpoint_of(run)
        until(lambda: endpoint_of(run).lost == [0])
        health = httpx.get(after.url.removesuffix("/v1") + "/health").json()

    print(f"another endpoint after {moved_s:.1f} s")
    assert after.url != before.url
    assert after.state is Phase.DEGRADED
    assert after.term > before.term
    assert {answer.completion_tokens for answer in answers} == {40}
    assert health["status"] == "ready"
    assert endpoint_of(run).state is Phase.STOPPED
    assert processes_of(run) == {}
