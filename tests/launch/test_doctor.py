"""The doctor knows the machine, names what is missing with its fix, and drafts what is not known."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch import doctor, site
from launch.compose import read
from launch.site import Partition, Slurm
from slurm.preflight import Grade
from tests.slurm_cluster import SlurmCluster

GPU = Partition(
    name="boost_usr_prod", default=True, time_min=1440, nodes=64, cpus=32, memory_mb=494000, gpus=4, gpu_type="a100", features=()
)  # fmt: skip
LEONARDO = Slurm(
    version="23.11.10", cluster="leonardo", partitions=(GPU,), settings={"KillWait": "30 sec"}, accounts=("AIFAC_1", "AIFAC_2")
)  # fmt: skip


@pytest.mark.parametrize(
    ("host", "environ", "cluster", "found"),
    [
        pytest.param("login07.leonardo.local", {}, None, "leonardo", id="host name"),
        pytest.param("uan03", {}, "lumi", "lumi", id="host name, LUMI"),
        pytest.param("login12", {"NERSC_HOST": "perlmutter"}, None, "perlmutter", id="what a login sets"),
        pytest.param("login01", {}, "deltaai", "deltaai", id="Slurm's name of the cluster"),
        pytest.param("login01", {}, "Generic-IB", "generic_ib", id="written otherwise"),
        pytest.param("n1", {}, "somewhere", None, id="unknown"),
        pytest.param("n1", {}, None, None, id="no Slurm"),
    ],
)
def test_the_site_is_known(host: str, environ: dict[str, str], cluster: str | None, found: str | None) -> None:
    """By the marks in the profiles; an unknown machine is nobody's."""
    assert site.detect(site.profiles(), host, environ, cluster) == found


def test_partitions_are_read_as_sinfo_writes_them() -> None:
    """With types and sockets of GPUs, endless limits and missing features."""
    text = (
        "boost_usr_prod*|1-00:00:00|64|32|494000+|gpu:a100:4(S:0-1)|(null)\n"
        "lrd_all_serial|4:00:00|2|8|30800|(null)|cascadelake,login\n"
        "mixed|infinite|1|128+|1000|gpu:4,nvme:1|x\n"
    )

    first, second, third = site.parse_partitions(text)

    assert first == GPU
    assert (second.time_min, second.gpus, second.features) == (240, 0, ("cascadelake", "login"))
    assert (third.time_min, third.gpus, third.gpu_type, third.cpus) == (None, 4, None, 128)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("1-00:00:00", 1440),
        ("2-12", 3600),
        ("02:30:00", 150),
        ("30:00", 30),
        ("45", 45),
        ("infinite", None),
        ("n/a", None),
    ],
)
def test_time_limits_are_read_in_all_of_slurms_forms(text: str, minutes: int | None) -> None:
    """Days, hours, minutes."""
    assert site.parse_limit(text) == minutes


@pytest.mark.parametrize(
    ("overrides", "changed", "name", "what"),
    [
        pytest.param(
            ["slurm.account=AIFAC_9"],
            {},
            "account",
            "no account 'AIFAC_9' here, but AIFAC_1, AIFAC_2",
            id="wrong account",
        ),
        pytest.param([], {}, "account", "jobs need an account here: yours are AIFAC_1", id="no account"),
        pytest.param(
            ["slurm.partition=boost_usr_prd"], {}, "partition", "no partition 'boost_usr_prd'", id="partition"
        ),
        pytest.param(["slurm.time_min=2000"], {}, "partition", "takes jobs of up to 1440 minutes", id="time"),
        pytest.param([], {"nodes": 3}, "partition", "has 3 nodes and the recipe needs 4", id="nodes"),
        pytest.param(["cluster.gpus_per_node=8"], {}, "partition", "have 4 GPUs and the profile says 8", id="GPUs"),
    ],
)
def test_what_slurm_says_otherwise_is_named(
    overrides: list[str], changed: dict[str, int], name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profile and the user against sinfo and the accounting; each with a fix."""
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    slurm = replace(LEONARDO, partitions=(replace(GPU, **changed),))  # type: ignore[arg-type]  # counts only
    asked = read(["+recipe=llama70b_disagg", "cluster=leonardo", *overrides])
    found = {item.name: item for item in doctor.judge_slurm(asked, slurm) if item.grade is Grade.FAILED}

    assert what in found[name].what
    assert found[name].fix


def test_a_machine_as_its_profile_has_it_passes() -> None:
    """Nothing to do."""
    asked = read(["+recipe=llama70b_disagg", "cluster=leonardo", "slurm.account=AIFAC_1"])

    assert {item.grade for item in doctor.judge_slurm(asked, LEONARDO)} == {Grade.OK}


@pytest.mark.parametrize(
    ("said", "grade", "what"),
    [
        pytest.param("nats-server: v2.15.1", Grade.OK, "v2.15.1", id="ours"),
        pytest.param("nats-server: v2.10.4", Grade.OK, "v2.10.4", id="the first that can"),
        pytest.param("nats-server: v2.10.3", Grade.FAILED, "2.10.4", id="the last that cannot"),
        pytest.param("nats-server: v2.9.25", Grade.FAILED, "v2.9.25", id="an older one"),
        pytest.param("Exec format error", Grade.WARNING, "Exec format error", id="one for other machines"),
    ],
)
def test_an_old_nats_server_is_named(said: str, grade: Grade, what: str) -> None:
    """With the lowest version that will do."""
    found = doctor.judge_nats("/usr/bin/nats-server", said)

    assert found.grade is grade
    assert what in found.what
    assert found.grade is Grade.OK or "2.10.4 or later" in str(found.fix)


def test_the_nats_server_of_this_environment_will_do(tmp_path: Path) -> None:
    """And a file that is no program is not taken for one."""
    found = doctor.judge_servers(read(["+recipe=tiny_agg"]).recipe)
    (tmp_path / "nats-server").write_bytes(b"\x7fELF")
    (tmp_path / "nats-server").chmod(0o755)
    odd = doctor.judge_nats("x", doctor.ask_version(str(tmp_path / "nats-server")))

    assert [(item.name, item.grade) for item in found] == [("servers", Grade.OK), ("nats", Grade.OK)]
    assert odd.grade is Grade.WARNING


def test_another_processor_needs_another_environment() -> None:
    """x86 logins of aarch64 machines."""
    recipe = read(
        ["+recipe=llama70b_disagg", "cluster=vista" if os.uname().machine == "x86_64" else "cluster=leonardo"]
    ).recipe
    (finding, *_) = doctor.judge_python(recipe)

    assert finding.grade is Grade.FAILED
    assert "this Python does not run there" in finding.what


def test_the_file_system_is_that_of_the_nearest_mount() -> None:
    """Spaces are written as octal."""
    mounts = "/dev/sda / ext4 rw 0 0\nfs:/x /leonardo_scratch lustre rw 0 0\nfs:/y /my\\040disk nfs4 rw 0 0\n"

    assert doctor.filesystem(Path("/leonardo_scratch/me/runs"), mounts) == "lustre"
    assert doctor.filesystem(Path("/my disk/runs"), mounts) == "nfs4"
    assert doctor.filesystem(Path("/leonardo_scratchy"), mounts) == "ext4"


def test_a_draft_says_what_slurm_says_and_what_to_check() -> None:
    """The partition with the most GPUs; the fabric by the interfaces of the login node."""
    text = site.draft("mine", LEONARDO, ["lo", "eno1", "hsn1", "hsn0"])
    content = yaml.safe_load(text)

    assert text.startswith("# @package _global_\n# leonardo: drafted")
    assert content["cluster"] == {
        "name": "mine",
        "gpus_per_node": 4,
        "gpu_request": "gres=gpu:{n}",
        "interface": "hsn0",
        "fabric": "cxi",
        "nixl_backends": ["LIBFABRIC"],
        "account_required": True,
        "limits": [{"partition": "boost_usr_prod", "time_min": 1440}],
    }
    assert content["slurm"] == {"partition": "boost_usr_prod"}


def ask(cluster: SlurmCluster, *words: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the doctor on the test's Slurm."""
    command = [*prefix, sys.executable, "-m", "launch.doctor", *words]
    env = {**os.environ, **cluster.env}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=env)


@pytest.mark.slurm
def test_on_a_real_slurm_the_doctor_sees_what_is_there(cluster: SlurmCluster, tmp_path: Path) -> None:
    """A sound launch passes; a partition that is too small or too short does not; a draft is a profile that plans."""
    runs = f"runs_dir={tmp_path}"
    sound = ask(cluster, "cluster=slurm_cpu", runs)
    wrong = ask(cluster, "cluster=slurm_cpu", runs, "slurm.partition=mian")
    short = ask(cluster, "cluster=slurm_cpu", runs, "slurm.partition=short")
    drafted = ask(cluster, "--write", str(tmp_path / "here.yaml"))
    profile = yaml.safe_load((tmp_path / "here.yaml").read_text())

    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert "main: 4 nodes" in sound.stdout
    assert "KILL comes 10 sec after a scancel" in " ".join(sound.stdout.split())
    assert wrong.returncode == 1
    assert "did you mean 'main'" in wrong.stdout
    assert short.returncode == 1
    assert "takes jobs of up to 2 minutes" in " ".join(short.stdout.split())
    assert drafted.returncode == 0, drafted.stderr
    assert profile["cluster"]["gpus_per_node"] == 0
    assert profile["slurm"]["partition"] == "main"


@pytest.mark.slurm
def test_inside_an_allocation_the_doctor_tests_its_nodes(
    cluster: SlurmCluster, tmp_path: Path, tiny_model: Path
) -> None:
    """The verdict of every rank, no engine, and exit code 1 where a node is not fit."""
    words = (
        "+recipe=tiny_2p2d",
        "cluster=slurm_cpu",
        "cluster.interface=lo",
        f"model.path=tiny:{tiny_model}",
        f"runs_dir={tmp_path}",
    )
    inside = ("salloc", "--nodes=4", "--ntasks-per-node=1", "--time=5")
    sound = ask(cluster, *words, prefix=inside)
    bad = ask(cluster, *words, "preflight.min_gbit_per_s=100000", prefix=inside)

    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert [f"rank {rank} on" in sound.stdout for rank in range(4)] == [True] * 4
    assert "ok (4 tests" in sound.stdout
    assert bad.returncode == 1
    assert "rank 3 on" in bad.stdout
    assert "failed rate: rank 0" in bad.stdout
    assert not list(tmp_path.glob("*/logs/latest/decode-*.log"))
