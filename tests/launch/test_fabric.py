"""`launch.doctor --fabric`: what it starts, what it prints, and what it leaves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from launch import fabric
from launch.compose import read
from launch.errors import ConfigError, SubmitError
from slurm import mpich
from slurm.pairs import Matrix, verdict
from tests.slurm_cluster import SlurmCluster


def ask(
    *words: str, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it."""
    argv = [*prefix, sys.executable, "-m", "launch.doctor", "--fabric", *words]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        argv, check=False, capture_output=True, text=True, timeout=200, env={**outside, **(env or {})}
    )


def test_three_processes_of_this_machine_measure_each_other(tmp_path: Path) -> None:
    """Over MPI where it is installed, else over sockets; tables, files and exit code say the same, and nothing is left."""
    runs = tmp_path / "runs"
    done = ask("--ranks", "3", "--png", str(tmp_path / "x.png"), "--json", str(tmp_path / "x.json"), f"runs_dir={runs}")
    told = json.loads((tmp_path / "x.json").read_text())
    with Image.open(tmp_path / "x.png") as image:
        texts = dict(image.info)

    # Three processes share the cores of whatever runs the tests: slow pairs are possible, and missing ones are not.
    assert done.returncode == (2 if told["verdict"]["slow"] else 0), done.stdout + done.stderr
    assert done.stdout.startswith("3 nodes over ")
    assert told["matrix"]["errors"] == []
    for kind, least, most in (("latency_us", 0.1, 1e6), ("gb_per_s", 0.001, 1e4)):
        for a, row in enumerate(told["matrix"][kind]):
            assert [value is None for value in row] == [a == b for b in range(3)]
            assert all(least < value < most for value in row if value is not None)
    assert f"{told['matrix']['gb_per_s'][0][2]:.2f}" in done.stdout
    assert texts["nodes"].split() == told["matrix"]["names"]
    assert list(runs.iterdir()) == []


MPIEXEC = """#!/bin/sh
for place in 1 2; do echo 'HYDRA_LAUNCH: sh -c "exit 7"'; done
echo HYDRA_LAUNCH_END
echo 'x ERROR fabric: mpi4py cannot load MPI: no libmpi.so'
exec sleep 100
"""


def test_where_mpi_fails_the_nodes_measure_over_sockets(tmp_path: Path) -> None:
    """An mpiexec whose processes end at once, as where its library is not found: said with the reason, and measured."""
    pytest.importorskip("mpi4py")
    mpiexec = tmp_path / "mpiexec.hydra"
    mpiexec.write_text(MPIEXEC)
    mpiexec.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if mpich.find_mpiexec(env) != str(mpiexec):
        pytest.skip("the mpiexec.hydra beside this Python goes first")
    done = ask("--ranks", "2", f"runs_dir={tmp_path / 'runs'}", env=env)

    assert done.returncode in (0, 2), done.stderr
    reason = "MPI failed on rank 0: mpi4py cannot load MPI: no libmpi.so"
    assert done.stdout.splitlines()[0] == f"2 nodes over sockets ({reason})"
    assert "not measured" not in done.stdout


@pytest.mark.nightly
def test_a_node_that_dies_takes_only_its_own_pairs(tmp_path: Path) -> None:
    """One of four processes is killed once it has met the others: what is left is measured, and who is missing is named."""
    argv = [sys.executable, "-m", "launch.doctor", "--fabric", "--ranks", "4", "--sockets", f"runs_dir={tmp_path}"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        while not (there := list(tmp_path.glob(".fabric-*/standing-3.json"))):
            assert process.poll() is None
            time.sleep(0.005)
        folder = there[0].parent
        pid = process_of(folder, 3)
        while not (folder / "reached-3.json").exists():
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        said = process.communicate(timeout=100)[0]

    unmeasured = [line for line in said.splitlines() if line.endswith("not measured")]
    assert process.returncode == 2
    assert len(unmeasured) == 3
    assert all("#3: not measured" in line for line in unmeasured)
    assert f"#3 left no result; the logs are in {folder}" in said


def process_of(folder: Path, rank: int) -> int:
    """The process that plays a node."""
    wanted = [b"slurm.matrix", str(folder).encode(), str(rank).encode()]
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (entry / "cmdline").read_bytes().split(b"\0")[-4:-1] == wanted:
                return int(entry.name)
    raise AssertionError(f"nobody plays rank {rank}")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        pytest.param([], "salloc --nodes=4", id="no job"),
        pytest.param(["--ranks", "1"], "pairs need 2 nodes and more, and there is 1", id="one node"),
        pytest.param(["--ranks", "2", "cluster=nowhere"], "nowhere", id="no such profile"),
    ],
)
def test_what_cannot_be_measured_is_said(
    words: list[str], what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what to do, and exit code 1."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    assert fabric.main(words) == 1
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_NNODES": "2"}, 4),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, 2),
        ({"SLURM_JOB_ID": "7"}, 1),
    ],
)
def test_the_nodes_are_those_of_the_job(environ: dict[str, str], count: int) -> None:
    """And not of the step that a shell in it may be."""
    assert fabric.nodes(environ) == count


def test_a_heterogeneous_job_is_refused() -> None:
    """One step does not reach all of its nodes."""
    with pytest.raises(SubmitError, match="heterogeneous"):
        fabric.nodes({"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "2"})


@pytest.mark.parametrize(
    ("direct", "mpi"), [pytest.param(False, "none", id="by itself"), pytest.param(True, "pmix", id="by the site's MPI")]
)
def test_one_step_starts_one_process_on_each_node(direct: bool, mpi: str) -> None:
    """Beside what else runs in the job, with the profile's arguments, setup and environment; our --mpi is the last."""
    words = [
        *("+recipe=tiny_agg", "cluster=slurm_cpu", "cluster.mpi=pmix", "cluster.srun_args=['--network=x']"),
        *("cluster.setup=['module load y']", "+cluster.env.FI_PROVIDER=cxi"),
    ]
    shell, flag, text = fabric.srun(read(words).recipe, 4, Path("/runs/a b"), direct)
    lines = text.splitlines()

    assert (shell, flag, lines[:-1]) == ("bash", "-c", ['export FI_PROVIDER="cxi"', "module load y"])
    assert lines[-1].startswith("exec srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --overlap ")
    assert f" --network=x --mpi={mpi} {sys.executable} " in lines[-1]
    assert lines[-1].endswith(" -m slurm.matrix '/runs/a b'")


def test_a_kind_of_mpi_is_a_word() -> None:
    """It becomes a flag of srun."""
    with pytest.raises(ConfigError, match="srun --mpi=list"):
        read(["+recipe=tiny_agg", "cluster=slurm_cpu", "cluster.mpi='pmix --x'"])


def shown(found: Matrix) -> str:
    """What is printed of it."""
    console = Console(file=io.StringIO(), width=300)
    fabric.show(found, verdict(found), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables_have_names_and_gaps() -> None:
    """A node with itself is empty, what was not measured a dash; node names are not markup."""
    rates = [[None, 8.0, 8.0], [3.0, None, 8.0], [8.0, None, None]]
    text = shown(
        Matrix(
            names=["n[1]", "n[2]", "n[3]"],
            over="x",
            latency_us=[[None, 2.0, 2.0], [2.0, None, 2.0], [2.0, 2.0, None]],
            gb_per_s=rates,
            errors=["n[2] - n[3]: closed"],
        )
    )
    lines = [line for line in text.splitlines() if line.startswith("│")]

    assert [[cell.strip() for cell in line.strip("│").split("│")] for line in lines[3:]] == [
        ["n[1]", "", "8.00", "8.00"],
        ["n[2]", "3.00", "", "8.00"],
        ["n[3]", "8.00", "-", ""],
    ]
    assert "failed n[2] - n[3]: closed" in text
    assert "slow n[2] -> n[1]: 3.00 GB/s, and the median is 8.00 GB/s" in text
    assert "slow n[2] - n[3]: not measured" in text


def test_many_nodes_are_told_by_what_is_slow() -> None:
    """Tables wider than a terminal help nobody."""
    full: list[list[float | None]] = [[None if a == b else 1.0 for b in range(17)] for a in range(17)]
    text = shown(Matrix(names=[f"n{rank}" for rank in range(17)], over="x", latency_us=full, gb_per_s=full))

    assert "│" not in text
    assert "no pair is slow" in text


@pytest.mark.slurm
@pytest.mark.nightly
def test_inside_an_allocation_all_its_nodes_are_measured(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Four nodes of a real Slurm by their names, over what is there and over sockets, both by one step."""
    inside = ("salloc", "--nodes=4", "--ntasks-per-node=1", "--time=5")
    words = (
        "cluster=slurm_cpu",
        "cluster.interface=lo",
        f"runs_dir={tmp_path / 'runs'}",
        "--json",
        str(tmp_path / "x"),
    )
    for more in ((), ("--sockets",)):
        done = ask(*words, *more, prefix=inside, env=cluster.env)
        told = json.loads((tmp_path / "x").read_text())

        assert done.returncode == (2 if told["verdict"]["slow"] else 0), done.stdout + done.stderr
        assert told["matrix"]["names"] == ["n1", "n2", "n3", "n4"]
        assert told["matrix"]["errors"] == []
        assert sum(value is not None for row in told["matrix"]["gb_per_s"] for value in row) == 12
    assert told["matrix"]["over"] == "sockets (--sockets)"
