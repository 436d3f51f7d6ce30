"""The batch script is text, to the letter, and refusals come before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.compose import read
from launch.errors import PlanError, SubmitError
from launch.plan import plan
from launch.recipe import Launcher
from slurm import executors

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param("llama70b_disagg.slurm_gpu8", ["+recipe=llama70b_disagg", "cluster=slurm_gpu8"], id="plain"),
        pytest.param(
            "llama70b_disagg.slurm_gpu4.site",
            [
                "+recipe=llama70b_disagg",
                "cluster=slurm_gpu4",
                "cluster.gpu_request='gres=gpu:{n}'",
                "slurm.partition=boost",
                "slurm.account=proj",
                "slurm.qos=normal",
                'slurm.constraint="gpu&hbm80g"',
                "slurm.cpus_per_task=32",
                "slurm.mem=494000",
                "slurm.exclusive=true",
                "slurm.time_min=1440",
                "slurm.setup=[module load cuda]",
                "slurm.sbatch.network=single_node_vni",
            ],
            id="every flag",
        ),
    ],
)
def test_the_batch_script_is_the_golden_one(name: str, overrides: list[str]) -> None:
    """To accept a change: UPDATE_GOLDEN=1 python -m pytest tests/slurm/test_executors.py, then read the diff."""
    recipe = read(overrides).recipe
    folder = Path("/scratch/user/runs/deployment/logs/attempt_1")
    text = executors.script(recipe, plan(recipe), folder, "/home/user/baton/.venv/bin/python")
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)

    assert path.read_text() == text


def test_without_slurm_the_refusal_says_where_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No sbatch on PATH."""
    recipe = read(["+recipe=tiny_disagg"]).recipe
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match="login node.*launcher=local"):
        executors.check(Launcher.SLURM, recipe, plan(recipe), 0)


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        pytest.param(["cluster.gpus_per_node=8"], 8, "16 GPUs on 2 nodes and this machine has 8", id="two nodes"),
        pytest.param(["cluster.gpus_per_node=16"], 8, "16 GPUs on 1 nodes and this machine has 8", id="too few GPUs"),
    ],
)
def test_a_machine_with_too_few_gpus_is_refused(overrides: list[str], gpus: int, message: str) -> None:
    """The local launcher has only this machine, whose GPUs its nodes share out."""
    recipe = read(["+recipe=llama70b_disagg", *overrides]).recipe
    with pytest.raises(PlanError, match=message):
        executors.check(Launcher.LOCAL, recipe, plan(recipe), gpus)
