"""A node that failed its preflight is left out of the deployment, or of the next job, as the recipe says."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.compose import Launch, read
from launch.errors import ConfigError
from launch.plan import plan
from launch.records import Phase
from launch.resubmit import again, check
from slurm.exclusion import bad_ranks, cannot_go_on, excluding
from slurm.preflight import Finding, Grade, Report, judge_links, moves_kv, peers
from slurm.probe import Link
from tests.deployments import command
from tests.slurm_cluster import SlurmCluster
from tests.system.test_scale import complete_with, members, on_slurm, phase, scale, status, until

ALWAYS = read(["+recipe=tiny_two_models", "preflight.kv=always"]).recipe
SHRINK = read(["+recipe=tiny_2p2d", "cluster=slurm_cpu", "preflight.on_bad_node=exclude_and_shrink"])


def report(rank: int, *own: str, unreachable: tuple[int, ...] = ()) -> Report:
    """What a rank found: faults of its own, and peers that it cannot reach."""
    links = [
        Link(peer=peer, host=f"h{peer}", address="a", error="no answer" if peer in unreachable else None)
        for peer in range(4)
        if peer != rank
    ]
    findings = [Finding(name=name, grade=Grade.FAILED, what=f"{name} is bad", fix="mend it") for name in own]
    findings += judge_links(links, SHRINK.recipe)
    return Report(attempt=1, rank=rank, host="h", findings=findings, links=links, seconds=0.1, node=f"n{rank}")


@pytest.mark.parametrize(
    ("reports", "bad"),
    [
        pytest.param([report(0), report(1)], [], id="all well"),
        pytest.param([report(0), report(1, "ecc")], [1], id="its own fault"),
        pytest.param([report(0), report(1, "rdma"), report(2, unreachable=(1,))], [1], id="and so others miss it"),
        pytest.param([report(2, unreachable=(1,)), report(3, unreachable=(1,)), report(1)], [1], id="two say so"),
        pytest.param([report(3, unreachable=(0, 1)), report(2), report(0), report(1)], [3], id="one says so of two"),
        pytest.param([report(2, unreachable=(1,)), report(0), report(1)], [2], id="word against word: the later"),
        pytest.param([report(1, unreachable=(0,)), report(2, unreachable=(0,)), report(0)], [0], id="the head"),
    ],
)
def test_who_is_bad(reports: list[Report], bad: list[int]) -> None:
    """With the node and the reason."""
    found = bad_ranks(reports, SHRINK.recipe)

    assert list(found) == bad
    assert all(f"node n{rank} is not fit: " in found[rank] for rank in bad)


@pytest.mark.parametrize(
    ("bad", "why_not"),
    [
        ([1], None),
        ([1, 3], None),
        ([2, 3], "no decode engine would be left"),
        ([0], "rank 0 carries the control plane"),
    ],
)
def test_a_deployment_goes_on_while_each_role_has_an_engine(bad: list[int], why_not: str | None) -> None:
    """And its head."""
    assert cannot_go_on(dict.fromkeys(bad, "bad"), plan(SHRINK.recipe)) == why_not


def test_an_engine_that_spans_a_bad_node_is_left_out_whole() -> None:
    """So two engines over two nodes each, one of prefill and one of decode, need all four."""
    wide = plan(read(["+recipe=llama70b_disagg", "cluster=slurm_gpu4"]).recipe)

    assert cannot_go_on({3: "bad"}, wide) == "no decode engine would be left"


def test_each_role_of_each_model_keeps_an_engine() -> None:
    """Another model's engine of the same role does not stand in."""
    pairs = [f"models.chat.roles.{kind}.replicas=1" for kind in ("prefill", "decode")]
    pairs += [f"models.embed.roles.{kind}.replicas=1" for kind in ("prefill", "decode")]
    gone = ["models.chat.roles.aggregated.replicas=0", "models.embed.roles.embedding.replicas=0"]
    where = plan(
        read(
            ["+recipe=tiny_two_models", "cluster=slurm_cpu", "engine.backend=echo", "cluster.cpu_engines_per_node=1"]
            + [*pairs, *gone, "models.chat.roles.decode.replicas=2"]
        ).recipe
    )
    assert [member.name for member in where.members][1:] == [
        *("chat-decode-0", "chat-decode-1", "embed-prefill-0", "embed-decode-0")
    ]

    assert cannot_go_on({1: "bad"}, where) is None
    assert cannot_go_on({4: "bad"}, where) == "no embed-decode engine would be left"
    assert [peers(where, rank) for rank in range(5)] == [(), (0,), (0,), (0,), (0, 3)]
    assert moves_kv(ALWAYS, where, 4, 3, True, True)
    assert not moves_kv(ALWAYS, where, 4, 0, True, True)  # whose prefill engine is another model's


def resubmitting(*more: str) -> Launch:
    """A launch that submits again."""
    return read(["+recipe=tiny_2p2d", "cluster=slurm_cpu", "preflight.on_bad_node=resubmit", *more])


def test_the_next_job_leaves_out_the_bad_nodes_at_most_twice() -> None:
    """Those that the user had excluded stay excluded; the printed words make the same recipe."""
    asked = resubmitting("slurm.sbatch.exclude=n9")
    reports = [report(0), report(1, "ecc"), report(2)]

    second = again(asked, reports, 1)
    assert second
    third = again(second, [report(0), report(3, "ecc")], 2)
    assert third

    assert second.recipe.slurm.sbatch["exclude"] == "n9,n1"
    assert third.recipe.slurm.sbatch["exclude"] == "n9,n1,n3"
    assert again(third, reports, 3) is None
    assert again(asked, [report(0)], 1) is None
    assert read(list(third.overrides)).recipe == third.recipe
    assert excluding(None, ["n1", "n1"]) == "n1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["cluster=vista"], "vista takes no job that does .*use exclude_and_shrink", id="no node lists"),
        pytest.param(["wait=no"], "somebody who submits again: use wait=ready", id="nobody there"),
        pytest.param(["launcher=local"], "is for launcher=slurm", id="no Slurm"),
    ],
)
def test_resubmission_that_could_not_be_is_refused_first(words: list[str], message: str) -> None:
    """Before the queue."""
    with pytest.raises(ConfigError, match=message):
        check(resubmitting(*words))


# --- on a real Slurm ------------------------------------------------------------------------------------------------

GPU = (
    "0, GPU-6b1e7a2c-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 00000000:1B:00.0, 81559, 4, {errors}, Disabled"
)


def planted(folder: Path, model: Path, policy: str, *bad: str) -> tuple[str, ...]:
    """Words of a launch of two prefill and two decode engines; the GPUs of the `bad` nodes have memory errors, and those of
    the others from the moment on when there is a file bin/ill.

    This machine has no GPU: what nvidia-smi prints stands in for the driver.
    """
    fake = folder / "bin"
    fake.mkdir(parents=True)
    lines = ["#!/bin/sh", "[ $# -eq 0 ] && echo 'CUDA Version: 12.6' && exit", "case $SLURMD_NODENAME in"]
    lines += [f"{node}) echo '{GPU.format(errors=3)}';;" for node in bad]
    lines += [f"*) [ -e {fake}/ill ] && echo '{GPU.format(errors=7)}' && exit"]
    lines += [f"echo '{GPU.format(errors=0)}';;", "esac"]
    (fake / "nvidia-smi").write_text("\n".join(lines))
    (fake / "nvidia-smi").chmod(0o755)
    return (
        *("+recipe=tiny_2p2d", "engine.backend=echo", f"model.path=tiny:{model}", "engine.device=cuda"),
        *("cluster=slurm_cpu", "cluster.interface=lo", "cluster.gpus_per_node=1", "slurm.time_min=10"),
        f"preflight.on_bad_node={policy}",
        f"slurm.setup=['export PATH={fake}:$PATH']",
    )


@pytest.mark.slurm
@pytest.mark.nightly
def test_a_deployment_goes_on_without_a_bad_node_and_says_so(
    tmp_path: Path, tiny_model: Path, cluster: SlurmCluster
) -> None:
    """Degraded, with the node and the reason; the others serve."""
    words = planted(tmp_path, tiny_model, "exclude_and_shrink", "n4")
    with on_slurm(tmp_path, cluster, "shrunk", *words, ready=False) as (run, process):
        until(lambda: phase(run) is Phase.DEGRADED or process.poll() is not None)
        answers = [complete_with(run, f"without it {i}") for i in range(4)]
        said = status(run, cluster.env)

    assert answers == [40] * 4
    assert said["state"] == "degraded"
    engines = {name for name in said["members"] if name.startswith(("prefill", "decode"))}
    assert engines == {"prefill-0", "prefill-1", "decode-0"}
    assert re.search(
        r"decode-1 was lost: node n4 is not fit: ecc: GPU 0 of .* has had 3 uncorrected", said["changes"][0]
    )


@pytest.mark.slurm
@pytest.mark.nightly
def test_a_job_that_joins_on_a_bad_node_leaves_alone(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """Whoever asked for it is told why, the deployment is as ready as before, and the next one takes the next names."""
    words = (*planted(tmp_path, tiny_model, "fail"), "roles.prefill.replicas=1", "roles.decode.replicas=1")
    with on_slurm(tmp_path, cluster, "sound", *words) as (run, _):
        (tmp_path / "bin" / "ill").touch()
        failed = scale(run, "decode=+1", env=cluster.env)
        (tmp_path / "bin" / "ill").unlink()
        until(lambda: len(cluster.run("squeue", "--noheader", "--format=%A").split()) == 1)
        between = phase(run), complete_with(run, "one is enough")
        joined = scale(run, "decode=+1", env=cluster.env)

    assert failed.returncode == 1
    assert "decode-1 did not join: node" in failed.stderr
    assert "has had 7 uncorrected memory errors" in failed.stderr
    assert between == (Phase.READY, 40)
    assert joined.returncode == 0, joined.stderr
    assert "decode-2 serve" in joined.stdout


@pytest.mark.slurm
@pytest.mark.nightly
def test_a_deployment_with_no_engine_of_a_role_ends(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """Both decode engines are on bad nodes; and with `fail` one is enough."""
    said = {}
    for policy, bad in (("exclude_and_shrink", ("n3", "n4")), ("fail", ("n4",))):
        words = planted(tmp_path / policy, tiny_model, policy, *bad)
        argv = command(tmp_path, *words, name=policy.replace("_", "-"))
        done = subprocess.run(
            argv, check=False, capture_output=True, text=True, timeout=120, env={**os.environ, **cluster.env}
        )
        assert done.returncode == 1
        said[policy] = done.stderr

    assert all("(rank 3) is not fit to serve" in text for text in said.values())
    assert cluster.run("squeue", "--noheader", "--states=RUNNING") == ""


@pytest.mark.slurm
@pytest.mark.nightly
def test_a_bad_node_is_left_out_of_the_next_job(tmp_path: Path, tiny_model: Path, cluster: SlurmCluster) -> None:
    """Of four nodes a deployment of three finds one bad, and runs on the others."""
    words = (*planted(tmp_path, tiny_model, "resubmit", "n2"), "roles.decode.replicas=1")
    with on_slurm(tmp_path, cluster, "again", *words) as (run, _):
        job = run.job()
        nodes = cluster.run("squeue", "--noheader", "--format=%N").split()
        states = members(run)
    output = (tmp_path / "again.out").read_text()

    assert job
    assert job.attempt == 2
    assert nodes == ["n[1,3-4]"]
    assert "submitting again without n2" in output
    assert states["decode-0"] == "ready"
    assert json.loads((run.path / "preflight.json").read_text())


def test_only_a_recipe_that_says_so_is_submitted_again() -> None:
    """The default ends with the first bad node."""
    asked = read(["+recipe=tiny_2p2d", "cluster=slurm_cpu"])

    assert again(asked, [report(0), report(1, "ecc")], 1) is None
    assert again(replace(resubmitting(), recipe=asked.recipe), [report(1, "ecc")], 1) is None
