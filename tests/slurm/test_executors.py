"""The batch script is text, to the letter, and refusals come before anything is queued."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from launch.compose import choices, read
from launch.errors import ConfigError, PlanError, SubmitError
from launch.plan import plan
from launch.recipe import Launcher
from slurm import batch, environments, executors
from slurm.batch import Submission
from slurm.environments import interpreter

GOLDEN = Path(__file__).parent.parent / "golden"


PROFILES = [name for name in choices("cluster") if not name.startswith(("local", "slurm_"))]


def submission(*overrides: str) -> Submission:
    """A job of a user who keeps the runs on scratch."""
    return Submission(run_dir=Path("/scratch/user/runs/deployment"), attempt=1, overrides=overrides)


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden files are the same whoever runs the tests."""
    monkeypatch.setattr(sys, "executable", "/home/user/baton/.venv/bin/python")
    monkeypatch.setattr(environments, "UNPACK", Path("/home/user/baton/slurm/unpack.py"))


def assert_golden(name: str, text: str) -> None:
    """To accept a change: UPDATE_GOLDEN=1 python -m pytest tests/slurm/test_executors.py, then read the diff."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.usefixtures("python")
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
                "slurm.sbatch.dependency=afterok:17",
            ],
            id="every flag",
        ),
        *(
            pytest.param(
                f"profile.{name}", ["+recipe=llama70b_disagg", f"cluster={name}", "slurm.account=proj"], id=name
            )
            for name in PROFILES
        ),
        *(
            pytest.param(
                f"environment.{kind}",
                ["+recipe=llama70b_agg", f"cluster={cluster}", "slurm.account=proj", f"environment.kind={kind}", *more],
                id=kind,
            )
            for kind, cluster, *more in (
                ("conda", "leonardo", "environment.path=/project/envs/baton"),
                ("archive", "vista", "environment.path=/project/envs/baton.tar.gz"),
                (
                    "apptainer",
                    "lumi",
                    "environment.path=/project/images/vllm.sif",
                    "environment.binds=[/pfs,/opt/rccl:/rccl]",
                ),
                ("podman_hpc", "perlmutter", "environment.path=nersc/vllm:26.09", "environment.args=[--nccl]"),
                ("pyxis", "slurm_gpu8", "environment.path=/project/images/vllm.sqsh", "environment.binds=[/lustre]"),
                ("cscs", "alps", "environment.path=/users/me/vllm.toml"),
            )
        ),
    ],
)
def test_the_batch_script_is_the_golden_one(name: str, overrides: list[str]) -> None:
    """For every flag, every profile and every kind of environment."""
    recipe = read(overrides).recipe

    assert_golden(f"{name}.sbatch", batch.script(recipe, plan(recipe), submission(*overrides)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["slurm.sbatch.array=0-3"], "launch each under a name of its own", id="array"),
        pytest.param(["slurm.sbatch.hetjob=true"], "one kind of node", id="het job"),
        pytest.param(["slurm.sbatch.nodes=7"], "the plan decides", id="nodes"),
        pytest.param(["slurm.sbatch.requeue=true"], "launch again", id="requeue"),
        pytest.param(["slurm.time_min=1"], "use at least 3", id="no time to serve"),
        pytest.param(["cluster=leonardo"], "add slurm.account=<yours>$", id="no account"),
        pytest.param(["cluster=perlmutter"], r"looks like NAME_g", id="no account, with its form"),
        pytest.param(
            ["cluster=marenostrum5", "slurm.account=p", "slurm.mem=10G"], "memory follows the CPUs", id="memory"
        ),
        pytest.param(
            ["cluster=vista", "slurm.sbatch.nodelist=c1"], "TACC deletes jobs that name nodes", id="node list"
        ),
        pytest.param(["cluster=vista", "cluster.gpu_request='gres=gpu:{n}'"], "each has one GPU", id="GPUs asked for"),
        pytest.param(
            ["cluster=frontier", "slurm.account=p", "slurm.time_min=360"],
            "no job of 2 nodes for 360 minutes in partition batch; it takes up to 91 nodes for 120 minutes; 92 to 183 nodes",
            id="over the limit of small jobs",
        ),
        pytest.param(["cluster=perlmutter", "slurm.account=p", "slurm.qos=debug"], "for 30 minutes", id="QOS"),
    ],
)
def test_what_the_site_would_refuse_is_refused_before_the_queue(overrides: list[str], message: str) -> None:
    """With what to change, in the user's own keys."""
    recipe = read(["+recipe=llama70b_disagg", "cluster=slurm_gpu8", *overrides]).recipe
    with pytest.raises(SubmitError, match=message):
        batch.refuse(recipe, plan(recipe), {})


def test_jobs_within_the_limits_and_accounts_of_the_environment_are_taken() -> None:
    """sbatch reads SBATCH_ACCOUNT itself; Frontier gives large jobs more time."""
    for overrides in (["cluster=leonardo"], ["cluster=frontier", "slurm.time_min=120"], ["cluster=slurm_gpu8"]):
        recipe = read(["+recipe=llama70b_disagg", *overrides]).recipe
        batch.refuse(recipe, plan(recipe), {"SBATCH_ACCOUNT": "proj"})


@pytest.mark.parametrize(
    ("cluster", "given", "account"),
    [
        ("perlmutter", "m1234", "m1234_g"),
        ("perlmutter", "m1234_g", "m1234_g"),
        ("lumi", "465000001", "project_465000001"),
        ("lumi", "project_465000001", "project_465000001"),
        ("deltaai", "abcd", "abcd-dtai-gh"),
        ("leonardo", "AIFAC_L01", "AIFAC_L01"),
    ],
)
def test_an_account_is_put_into_the_form_of_the_site(cluster: str, given: str, account: str) -> None:
    """Once: one that has the form stays."""
    assert batch.account(read(["+recipe=tiny_agg", f"cluster={cluster}"]).recipe.cluster, given) == account


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["environment.kind=container", "environment.path=x.sif"], "names no container runtime"),
        (["environment.kind=apptainr"], "did you mean 'apptainer'"),
        (["environment.kind=conda"], "needs environment.path"),
        (["environment.path=x.sif"], "environment.kind=container"),
        (["environment.kind=archive", "environment.path=x.tar"], "cluster.local_scratch"),
    ],
)
def test_an_environment_that_cannot_be_had_is_refused(overrides: list[str], message: str) -> None:
    """Before anything is queued."""
    with pytest.raises(ConfigError, match=message):
        interpreter(read(["+recipe=llama70b_agg", "cluster=slurm_gpu8", *overrides]).recipe, Path("/runs/x"))


def test_without_slurm_the_refusal_says_where_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No sbatch on PATH."""
    recipe = read(["+recipe=tiny_disagg"]).recipe
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match="login node.*launcher=local"):
        executors.check(Launcher.SLURM, recipe, plan(recipe), 0)


def test_another_environment_is_refused_where_nothing_would_enter_it() -> None:
    """Agents on this machine run in the Python that launches them."""
    recipe = read(["+recipe=tiny_agg", "environment.kind=conda", "environment.path=/project/envs/baton"]).recipe
    with pytest.raises(SubmitError, match="environment.kind=conda is for jobs"):
        executors.check(Launcher.LOCAL, recipe, plan(recipe), 0)


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        pytest.param(["cluster.gpus_per_node=8"], 8, "16 GPUs on 2 nodes and this machine has 8", id="two nodes"),
        pytest.param(["cluster.gpus_per_node=16"], 8, "needs 16 GPUs and this machine has 8", id="too few GPUs"),
    ],
)
def test_a_machine_with_too_few_gpus_is_refused(overrides: list[str], gpus: int, message: str) -> None:
    """The local launcher has only this machine, whose GPUs its nodes share out."""
    recipe = read(["+recipe=llama70b_disagg", *overrides]).recipe
    with pytest.raises(PlanError, match=message):
        executors.check(Launcher.LOCAL, recipe, plan(recipe), gpus)
