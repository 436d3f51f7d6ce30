"""A disaggregated deployment says what plain vLLM says, wherever it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.recipe import Kind
from tests.deployments import Deployment, deployed, processes_of
from tests.reference import Reference, ask_all, chat, complete
from tests.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SHAPES = {
    "local-1p1d": ("+recipe=tiny_disagg",),
    "local-2p2d": ("+recipe=tiny_2p2d",),
    "debug-1p1d": ("+recipe=tiny_disagg", "launcher=debug"),
    "slurm-1p1d": ("+recipe=tiny_disagg", "cluster=slurm_cpu", "cluster.interface=lo", "slurm.cpus_per_task=2"),
    "slurm-2p2d": ("+recipe=tiny_2p2d", "cluster=slurm_cpu", "cluster.interface=lo", "slurm.cpus_per_task=2"),
}
# Each launcher and each shape is there without these two; only their other combination is not.
NIGHTLY = ("local-2p2d", "slurm-1p1d")


def marks(name: str) -> list[pytest.MarkDecorator]:
    """What a shape needs, and when it runs."""
    return [pytest.mark.slurm] * ("slurm" in name) + [pytest.mark.nightly] * (name in NIGHTLY)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=marks(name)) for name in SHAPES])
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, reference: Reference
) -> Iterator[Deployment]:
    """Each shape in turn; `reference` comes first, so that its engine does not run beside ours."""
    name: str = request.param
    env = None
    if "slurm" in name:
        cluster: SlurmCluster = request.getfixturevalue("cluster")
        env = cluster.env
    folder = tmp_path_factory.mktemp(name)
    with deployed(folder, *SHAPES[name], f"model.path=tiny:{tiny_model}", name=name, env=env) as running:
        yield running
    assert processes_of(running.run) == {}


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "streamed"])
def test_completions_equal_plain_vllm(deployment: Deployment, reference: Reference, stream: bool) -> None:
    """Text, finish reason and usage of 50 prompts of 5 to 1,500 tokens are plain vLLM's."""
    answers = ask_all(deployment.client, reference.prompts, complete, stream)

    assert reference.completions == answers


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "streamed"])
def test_chats_equal_plain_vllm(deployment: Deployment, reference: Reference, stream: bool) -> None:
    """The same through the chat template."""
    answers = ask_all(deployment.client, reference.prompts, chat, stream)

    assert reference.chats == answers


def test_the_cache_really_moved(deployment: Deployment, reference: Reference) -> None:
    """Every decode engine pulled blocks by NIXL without a failure, and every answer took exactly both of its legs."""
    decodes = [name for name in deployment.pids() if name.startswith(Kind.DECODE)]
    frontend = "frontend-0"
    fresh = tuple(f"again {text}" for text in reference.prompts[:12])
    moved = [deployment.metric(name, "vllm:nixl_bytes_transferred_sum") for name in decodes]
    legs = {kind: deployment.metric(frontend, "baton_frontend_legs_total", kind=kind) for kind in Kind}
    ask_all(deployment.client, fresh, complete, False)

    for name, before in zip(decodes, moved, strict=True):
        assert deployment.metric(name, "vllm:nixl_bytes_transferred_sum") > before
        assert deployment.metric(name, "vllm:nixl_num_failed_transfers_total") == 0
    for kind, added in {Kind.PREFILL: len(fresh), Kind.DECODE: len(fresh), Kind.AGGREGATED: 0}.items():
        assert deployment.metric(frontend, "baton_frontend_legs_total", kind=kind) == legs[kind] + added


def test_a_client_that_leaves_is_cancelled_at_the_engine(deployment: Deployment) -> None:
    """A second later no engine computes a token any more."""
    decodes = [name for name in deployment.pids() if name.startswith(Kind.DECODE)]

    def produced() -> float:
        return sum(deployment.metric(name, "vllm:generation_tokens_total") for name in decodes)

    stream = deployment.client.completions.create(
        model="tiny",
        prompt="go on and on",
        max_tokens=3000,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in range(5):
        next(stream)
    running = sum(deployment.metric(name, "baton_worker_streams") for name in decodes)
    stream.close()
    time.sleep(1.0)
    after = produced()
    time.sleep(0.5)

    assert running == 1
    assert sum(deployment.metric(name, "baton_worker_streams") for name in decodes) == 0
    assert produced() == after
