"""Fixtures that start the real thing; engines are shared between the tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from launch.tiny_model import make_tiny_model
from tests.deployments import Deployment, deployed
from tests.reference import Reference, reference_answers
from tests.slurm_cluster import SlurmCluster, slurm_cluster

# Two busy cores make single examples slow now and then; how long they take is not what is tested.
settings.register_profile("baton", deadline=None)
settings.load_profile("baton")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own model."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What plain vLLM answers; its server runs only while the answers are collected."""
    return reference_answers(tiny_model, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A real Slurm cluster of four nodes on this machine."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm"), nodes=4) as running:
        yield running


@pytest.fixture(scope="session")
def echo(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One prefill and one decode worker with echo engines: everything but vLLM, ready in two seconds."""
    folder = tmp_path_factory.mktemp("echo")
    with deployed(
        folder, "+recipe=tiny_disagg", "engine.backend=echo", f"model.path=tiny:{tiny_model}", name="echo"
    ) as running:
        yield running
