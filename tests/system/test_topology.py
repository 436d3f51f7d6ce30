"""Engines over several processes and nodes say what plain vLLM says, and come back as a whole when a part dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest
import zmq

from launch.plan import plan
from launch.records import MemberRecord, Phase, State
from slurm.places import places
from tests.deployments import Deployment, children, deployed, processes_of, targets
from tests.reference import Reference, ask_all, complete
from tests.slurm_cluster import SlurmCluster
from tests.system.test_lifecycle import until
from workers.engine.arguments import kv_event_sources, role_of

PROMPTS = 10
PREFILL_OVER_NODES = (
    "+recipe=tiny_disagg",
    "roles.prefill.tensor_parallel=2",
    "roles.prefill.nodes=2",
)
SHAPES = {
    "tp2": ("+recipe=tiny_tp2",),
    "tp2-2nodes": ("+recipe=tiny_tp2_2nodes",),
    "dp2": ("+recipe=tiny_dp2", "engine.kv_events=true"),
    "dp4-2nodes": ("+recipe=tiny_dp4_2nodes",),
    "prefill-2nodes": PREFILL_OVER_NODES,
    "prefill-dp2": (
        "+recipe=tiny_disagg",
        "roles.prefill.data_parallel=2",
        "roles.decode.data_parallel=2",
    ),
}
ECHO = ("+recipe=tiny_tp2_2nodes", "engine.backend=echo", "roles.aggregated.replicas=2")


@pytest.fixture(scope="module")
def wide(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, reference: Reference
) -> Iterator[Deployment]:
    """A shape that runs; `reference` comes first, so that its engine does not run beside ours."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    with deployed(folder, *SHAPES[name], f"model.path=tiny:{tiny_model}", name=name) as running:
        yield running
    assert processes_of(running.run) == {}


def members(running: Deployment) -> dict[str, MemberRecord]:
    """What the agents say of each member."""
    return {name: record for rank in running.run.ranks(1).values() for name, record in rank.members.items()}


def whole_again(running: Deployment, before: dict[str, MemberRecord], names: tuple[str, ...]) -> bool:
    """Whether all these members run as other processes than before, and the deployment is ready."""
    now, endpoint = members(running), running.run.endpoint()
    others = all(now[name].state is State.READY and now[name].pid != before[name].pid for name in names)
    return others and endpoint is not None and endpoint.state is Phase.READY


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("wide", list(SHAPES), indirect=True, scope="module")
def test_answers_equal_plain_vllm(wide: Deployment, reference: Reference) -> None:
    """Text, finish reason and usage, for every shape."""
    answers = ask_all(wide.client, reference.prompts[:PROMPTS], complete, False)

    assert answers == reference.completions[:PROMPTS]


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("wide", ["tp2-2nodes"], indirect=True, scope="module")
@pytest.mark.parametrize("victim", ["follower", "engine core", "follower's worker"])
def test_an_engine_comes_back_whole(wide: Deployment, reference: Reference, victim: str) -> None:
    """Whichever part is killed while nothing runs, all members of the engine start again by themselves, and answer."""
    names = ("aggregated-0.0", "aggregated-0.1")
    before = members(wide)
    if victim == "follower":
        pid = before[names[1]].pid
    elif victim == "engine core":
        pid = children(before[names[0]].pid)["VLLM::EngineCore"]
    else:
        pid = children(before[names[1]].pid)["VLLM::Worker_TP1"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: members(wide)[names[0]].state is not State.READY)
    until(lambda: whole_again(wide, before, names), 120)
    answers = ask_all(wide.client, reference.prompts[:4], complete, False)

    assert answers == reference.completions[:4]
    generations = {members(wide)[name].generation for name in names}
    assert generations == {before[names[0]].generation + 1}


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("wide", ["dp2"], indirect=True, scope="module")
def test_every_data_parallel_rank_serves_and_publishes(wide: Deployment, reference: Reference) -> None:
    """Both ranks of one engine produce tokens, and each tells of its blocks at a port of its own."""
    recipe = wide.run.recipe()
    member = plan(recipe).members[0]
    sources = kv_event_sources(role_of(recipe, member), member, places(wide.run.ranks(1))[0])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    subscribers = {rank: context.socket(zmq.SUB) for rank in sources}
    for rank, socket in subscribers.items():
        socket.connect(sources[rank][0])
        socket.subscribe(b"")
    fresh = tuple(f"again {text}" for text in reference.prompts[:16])

    def told(rank: int) -> list[str]:
        ask_all(wide.client, fresh, complete, False)
        found: list[str] = []
        while subscribers[rank].poll(2000):
            _, _, payload = subscribers[rank].recv_multipart()
            _, events, sender = msgspec.msgpack.decode(payload)
            assert sender == rank
            found += [event["type"] for event in events]
        return found

    events = {rank: told(rank) for rank in sources}
    for socket in subscribers.values():
        socket.close()

    assert sorted(sources) == [0, 1]
    assert all("BlockStored" in found for found in events.values())
    for rank in sources:
        assert wide.metric("aggregated-0", "vllm:generation_tokens_total", dp_rank=str(rank)) > 0


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("wide", ["dp4-2nodes"], indirect=True, scope="module")
def test_each_node_serves_its_own_data_parallel_ranks(wide: Deployment, reference: Reference) -> None:
    """One engine, two workers: the router sees both, and all four ranks produce tokens."""
    ask_all(wide.client, reference.prompts[:24], complete, False)

    for rank in range(4):
        assert wide.metric(f"aggregated-0.{rank // 2}", "vllm:generation_tokens_total", dp_rank=str(rank)) > 0


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("wide", ["dp4-2nodes"], indirect=True, scope="module")
def test_data_parallel_nodes_start_again_together(wide: Deployment, reference: Reference) -> None:
    """Ranks that wait for each other at every step are of no use alone."""
    names = ("aggregated-0.0", "aggregated-0.1")
    before = members(wide)
    os.kill(before[names[1]].pid, signal.SIGKILL)
    until(lambda: members(wide)[names[0]].state is not State.READY)
    until(lambda: whole_again(wide, before, names), 120)

    assert ask_all(wide.client, reference.prompts[:4], complete, False) == reference.completions[:4]


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("wide", ["prefill-2nodes"], indirect=True, scope="module")
def test_decode_pulls_from_every_node_of_a_prefill_engine(wide: Deployment, reference: Reference) -> None:
    """The blocks of the second node come too: an engine id that differs between the nodes would fail the request."""
    moved = wide.metric("decode-0", "vllm:nixl_bytes_transferred_sum")
    ask_all(wide.client, tuple(f"once more {text}" for text in reference.prompts[:6]), complete, False)

    assert wide.metric("decode-0", "vllm:nixl_bytes_transferred_sum") > moved
    assert wide.metric("decode-0", "vllm:nixl_num_failed_transfers_total") == 0


@pytest.fixture(scope="module")
def two_engines(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """Two engines over two nodes each, without vLLM."""
    with deployed(tmp_path_factory.mktemp("two"), *ECHO, f"model.path=tiny:{tiny_model}", name="two") as running:
        yield running
    assert processes_of(running.run) == {}
    assert all(rank.ended and not rank.failure for rank in running.run.ranks(1).values())


@pytest.mark.parametrize("victim", ["aggregated-0.0", "aggregated-0.1"])
def test_only_the_engine_of_a_dead_member_goes_down(two_engines: Deployment, victim: str) -> None:
    """All of its members start again, in one generation; the other engine keeps its processes, and serves meanwhile."""
    before = members(two_engines)
    os.kill(before[victim].pid, signal.SIGKILL)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: complete(two_engines.client, f"meanwhile {i}", False), range(20)))
    until(lambda: whole_again(two_engines, before, ("aggregated-0.0", "aggregated-0.1")))
    after = members(two_engines)

    assert {answer.completion_tokens for answer in answers} == {40}
    assert {after[f"aggregated-0.{node}"].generation for node in (0, 1)} == {before[victim].generation + 1}
    assert {after[f"aggregated-0.{node}"].asked for node in (0, 1)} == {before[victim].generation + 1}
    for name in ("aggregated-1.0", "aggregated-1.1"):
        assert after[name].pid == before[name].pid


@pytest.mark.slurm
def test_an_engine_over_nodes_of_a_slurm_job_comes_back(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """The same in a job whose step ran on two nodes: neither the job nor the step minds."""
    shape = ("+recipe=tiny_tp2_2nodes", "engine.backend=echo", "cluster=slurm_cpu", "cluster.interface=lo")
    names = ("aggregated-0.0", "aggregated-0.1")
    with deployed(tmp_path, *shape, f"model.path=tiny:{tiny_model}", name="wide", env=cluster.env) as running:
        before = members(running)
        os.kill(before[names[1]].pid, signal.SIGKILL)
        until(lambda: whole_again(running, before, names), 60)

        assert complete(running.client, "after it", False).completion_tokens == 40


def test_every_member_has_a_page_and_followers_get_no_requests(two_engines: Deployment) -> None:
    """The page of a follower says that its process lives, and what it uses."""
    pages = {item["labels"]["member"]: item["targets"][0] for item in targets(two_engines.run)}
    leaders, followers = (
        [f"aggregated-{engine}.0" for engine in (0, 1)],
        [f"aggregated-{engine}.1" for engine in (0, 1)],
    )

    assert sorted(pages) == sorted([*leaders, *followers, "frontend-0"])
    for name in followers:
        assert httpx.get(f"http://{pages[name]}/health").status_code == 200
        assert two_engines.metric(name, "process_resident_memory_bytes", role="aggregated") > 0
        assert "baton_worker_streams" not in two_engines.http.get(f"http://{pages[name]}/metrics").text
    for name in leaders:
        assert "baton_worker_streams" in two_engines.http.get(f"http://{pages[name]}/metrics").text
