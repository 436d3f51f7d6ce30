"""What cannot work ends with a clear error, a non-zero exit, and nothing left running."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch.records import RunDirectory
from tests.deployments import command, processes_of
from tests.slurm_cluster import SlurmCluster


def refused(folder: Path, *overrides: str, env: dict[str, str] | None = None, timeout_s: float = 120) -> str:
    """Launch, expect exit code 1 and nothing running; returns the error without its prefix."""
    argv = command(folder, *overrides, name="refused")
    done = subprocess.run(
        argv, check=False, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **(env or {})}
    )

    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("error: "), done.stderr
    assert "Traceback (most recent call last)" not in done.stderr.splitlines()[0]
    assert processes_of(RunDirectory(folder / "runs" / "refused")) == {}
    return done.stderr.removeprefix("error: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ["+recipe=tiny_disag"], "no recipe named 'tiny_disag', did you mean 'tiny_disagg'?", id="unknown recipe"
        ),
        pytest.param(
            ["+recipe=tiny_disagg", "engine.devise=cpu"],
            "unknown key 'engine.devise', did you mean 'device'?",
            id="unknown key",
        ),
        pytest.param(["+recipe=tiny_disagg", "roles.decode.replicas=-2"], "start at 1", id="impossible count"),
        pytest.param(
            ["+recipe=llama70b_disagg", "cluster.gpus_per_node=64"],
            "needs 16 GPUs and this machine has",
            id="more GPUs than the node has",
        ),
        pytest.param(["+recipe=llama70b_agg"], "cluster.gpus_per_node=8", id="no GPUs"),
        pytest.param(
            ["+recipe=tiny_disagg", "engine.args.tool_call_parser=hermez"],
            "tool_call_parser='hermez' is no parser of vLLM 0.32, did you mean 'hermes'?",
            id="unknown parser",
        ),
        pytest.param(
            ["+recipe=tiny_disagg", "engine.args.block_sise=32"],
            "engine.args.block_sise is no engine argument of vLLM 0.32, did you mean 'block_size'?",
            id="unknown engine option",
        ),
        pytest.param(
            ["+recipe=tiny_disagg", "engine.connector=[nixl,lmcache]"],
            "needs the Python package 'lmcache', which this environment lacks: pip install lmcache",
            id="connector without its package",
        ),
        pytest.param(
            ["+recipe=tiny_disagg", "roles.decode.args.block_size=64"],
            "prefill and decode engines must agree on block_size",
            id="unequal block sizes",
        ),
        pytest.param(
            ["+recipe=tiny_agg", "roles.aggregated.pipeline_parallel=2"],
            "pipeline_parallel",
            id="pipeline parallel on the CPU",
        ),
        pytest.param(
            ["+recipe=tiny_disagg", "model.path=/no/such/model"],
            "model.path=/no/such/model is not a folder with a config.json",
            id="model missing",
        ),
        pytest.param(
            ["+recipe=tiny_disagg", "cluster=slurm_cpu"], "launcher=slurm needs sbatch on PATH", id="no sbatch"
        ),
    ],
)
def test_what_is_wrong_before_the_start_is_said(tmp_path: Path, overrides: list[str], message: str) -> None:
    """Nothing is written either: there is no run directory."""
    path = os.pathsep.join(item for item in os.environ["PATH"].split(os.pathsep) if not Path(item, "sbatch").exists())
    assert message in refused(tmp_path, *overrides, env={"PATH": path})
    assert not (tmp_path / "runs").exists()


@pytest.mark.slurm
def test_what_sbatch_refuses_is_passed_on(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """In Slurm's own words."""
    shape = ("+recipe=tiny_disagg", "cluster=slurm_cpu", f"model.path=tiny:{tiny_model}", "slurm.partition=nosuch")
    error = refused(tmp_path, *shape, env=cluster.env)

    assert "sbatch refused the job" in error
    assert "invalid partition specified: nosuch" in error


@pytest.mark.engine
def test_an_engine_that_dies_while_loading_shows_its_last_lines(tmp_path: Path, tiny_model: Path) -> None:
    """The whole deployment ends; the reason is on the screen."""
    error = refused(tmp_path, "+recipe=tiny_agg", f"model.path=tiny:{tiny_model}", "engine.args.max_model_len=999999")

    assert "aggregated-0 exited with code 1; the end of" in error
    assert "max_model_len" in error


@pytest.mark.engine
def test_an_engine_that_is_never_ready_is_named(tmp_path: Path, tiny_model: Path) -> None:
    """After engine.ready_timeout_s."""
    error = refused(tmp_path, "+recipe=tiny_agg", f"model.path=tiny:{tiny_model}", "engine.ready_timeout_s=3")

    assert "aggregated-0 was not ready within 3 s (engine.ready_timeout_s)" in error


def test_a_server_that_cannot_be_started_is_named(tmp_path: Path, tiny_model: Path) -> None:
    """The control plane fails like any other member."""
    shape = ("+recipe=tiny_disagg", "engine.backend=echo", f"model.path=tiny:{tiny_model}")

    assert "control.etcd=/no/etcd is not an executable file" in refused(tmp_path, *shape, "control.etcd=/no/etcd")
