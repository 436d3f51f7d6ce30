"""A cut in the network of a whole deployment, whose nodes are network namespaces: nobody's answer is lost or another one's."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.records import Phase
from tests.chaos.asks import Asks
from tests.chaos.clients import Clients, End
from tests.deployments import Deployment, deployed
from tests.namespaces import Nodes, can_make_nodes, nodes
from tests.system.test_lifecycle import until

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not can_make_nodes(), reason="needs root and iproute2"),
]
CUT_S = 12.0
CLIENTS = 4


@contextlib.contextmanager
def on_nodes(folder: Path, model: Path, count: int, *shape: str) -> Iterator[tuple[Deployment, Nodes]]:
    """A deployment of one engine a node, whose first node has none."""
    common = (
        "launcher=allocation",
        "cluster=slurm_cpu",
        "cluster.interface=eth0",
        "control.dedicated=true",
        "preflight.kv=never",
    )
    with nodes(count) as found:
        env = found.environment(folder / "bin")
        with deployed(folder, *shape, *common, f"model.path=tiny:{model}", name="cut", env=env) as running:
            yield running, found


async def under(running: Deployment, asks: Asks, nodes: Nodes, victim: int) -> tuple[Clients, int]:
    """Clients ask, while a node is cut off from all others for `CUT_S` seconds.

    Returns the clients, and how many decode workers the frontend would have asked at the end of the cut.
    """
    urls = [url.removesuffix("/v1") for url in running.endpoint.urls]
    clients = Clients(asks, urls, running.run.api_key(), lambda url, since: False)
    quiet = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(clients.run(CLIENTS, quiet))
        await asyncio.sleep(1)
        nodes.cut_off(victim)
        await asyncio.sleep(CUT_S)
        left = await asyncio.to_thread(usable, running, "decode")
        nodes.mend()
        await asyncio.sleep(1)
        quiet.set()
    print(f"{dict(clients.tally.ends)}, longest gap {clients.tally.longest_gap_s:.1f} s, {left} decode workers left")
    return clients, left


def usable(running: Deployment, kind: str) -> int:
    """Workers of a kind that the frontend would ask now."""
    return int(running.metric("frontend-0", "baton_frontend_usable_workers", kind=kind))


async def test_a_node_that_nothing_reaches_costs_no_request(tiny_model: Path, tmp_path: Path) -> None:
    """The node of a decode worker is cut off from frontend and control plane, its links up: answers go on elsewhere after the stall
    timeout, each to its right end and once; and it is asked again when it is there again, by the same process.
    """
    shape = ("+recipe=tiny_2p2d", "engine.backend=echo", "engine.echo_interval_s=0.02", "roles.prefill.replicas=1")
    with on_nodes(tmp_path / "deployment", tiny_model, 4, *shape) as (running, found):
        place = {name: rank for rank, record in running.run.ranks(1).items() for name in record.members}
        before = running.pids()
        clients, left = await under(running, Asks(tiny_model, 4), found, place["decode-1"])
        began = time.monotonic()
        until(lambda: usable(running, "decode") == 2, 30)
        print(f"asked again {time.monotonic() - began:.1f} s later")
        endpoint = running.run.endpoint()

        assert left == 1
        assert clients.tally.problems == []
        assert clients.tally.ends[End.RIGHT] > 20
        assert running.metric("frontend-0", "baton_frontend_resumed_answers_total") > 0
        assert clients.tally.longest_gap_s < 8
        assert running.pids() == before
        assert endpoint
        assert endpoint.state is Phase.READY
