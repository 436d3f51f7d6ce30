"""`python -m launch.doctor --fabric`: the network between all pairs of an allocation's nodes, and which pairs are slow.

The nodes measure by themselves (slurm.matrix), started by one srun, or on this machine as a trial; this is the command around
them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch import site
from launch.compose import read
from launch.errors import LaunchError, SubmitError
from launch.recipe import Recipe
from launch.records import write
from slurm import batch
from slurm.environments import interpreter
from slurm.heatmap import picture
from slurm.matrix import MEET_S, MPI_START_S, ROUND_S, Asked, Meeting, Standing, child
from slurm.pairs import Found, Matrix, Verdict, matrix, verdict

SOUND, IMPOSSIBLE, SLOW = 0, 1, 2
POLL_S = 0.1
STOP_S = 10.0  # srun ends its step
# More columns than this are wider than a terminal.
WIDEST = 16
TAIL = 5


def main(words: Sequence[str]) -> int:
    """Measure and tell: 0 when all pairs are alike, 2 when some are slow or not reached, 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.doctor --fabric",
        description="Latency and bandwidth between all pairs of the allocation's nodes; exit code 2 when some pair has less "
        "than half of the median bandwidth or over three times the median latency.",
        allow_abbrev=False,
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a heat map")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the matrices and the verdict")
    parser.add_argument("--ranks", type=int, metavar="N", help="a trial: N processes on this machine, without Slurm")
    parser.add_argument("--sockets", action="store_true", help="measure over plain sockets, even where there is MPI")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as for launch: cluster=NAME, cluster.mpi=pmix, ..."
    )
    given = parser.parse_args(words)
    console = Console(soft_wrap=True)
    try:
        found = matrix(measure(given.overrides, given.ranks, "--sockets" if given.sockets else ""))
        told = verdict(found)
        for file, content in ((given.png, picture(found)), (given.json, as_json(found, told))):
            if file is not None:
                file.write_bytes(content)
    except (LaunchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return IMPOSSIBLE
    show(found, told, console)
    return SLOW if told.slow else SOUND


def measure(overrides: Sequence[str], ranks: int | None, sockets: str) -> list[Found]:
    """What all nodes found.

    Args:
        overrides: Of the recipe, for the cluster's profile, its environment and runs_dir.
        ranks: Processes on this machine for a trial, or None for the nodes of the allocation that we are in.
        sockets: Why not to use MPI; empty to use it.

    Raises:
        LaunchError: Nothing can be measured here.
    """
    recipe_given = any(word.lstrip("+").startswith("recipe=") for word in overrides)
    asked = read([*([] if recipe_given else ["+recipe=tiny_agg"]), *_profile(overrides, ranks), *overrides])
    recipe = asked.recipe
    size = ranks if ranks is not None else nodes(os.environ)
    if size < 2:
        raise SubmitError(f"pairs need 2 nodes and more, and there is {size}: `salloc --nodes=4 ...`, or --ranks 3")
    direct = ranks is None and recipe.cluster.mpi is not None and not sockets
    asked.runs_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".fabric-", dir=asked.runs_dir)).resolve()  # all nodes have to see it
    task = Asked(
        size=size, cluster=recipe.cluster, secret=secrets.token_bytes(32), sockets=sockets, direct=direct
    )  # fmt: skip
    write(folder / "asked.json", msgspec.json.encode(task), mode=0o600)
    commands = [srun(recipe, size, folder, direct)] if ranks is None else [local(folder, rank) for rank in range(size)]
    limit_s = 3 * MEET_S + MPI_START_S + 2 * ROUND_S * size
    try:
        codes = run(commands, environment(os.environ), folder, limit_s)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    meeting = Meeting(folder)
    found = [item for rank in range(size) if (item := meeting.get("found", rank, Found))]
    if not found:
        raise LaunchError(f"no node found anything (exit codes {codes}):\n{said(folder)}\nall logs are in {folder}")
    absent = set(range(size)) - {item.rank for item in found}
    if not absent:
        shutil.rmtree(folder, ignore_errors=True)
    return [*found, *(lost(meeting, rank, found[0].over) for rank in sorted(absent))]


def lost(meeting: Meeting, rank: int, over: str) -> Found:
    """What stands for a node that left no result: its process died on the way."""
    where = meeting.get("standing", rank, Standing)
    host, why = where.host if where else f"rank{rank}", f"left no result; the logs are in {meeting.path}"
    return Found(rank=rank, host=host, address=where.address if where else "", over=over, errors={rank: why})


def nodes(environ: Mapping[str, str]) -> int:
    """How many nodes the allocation has that we are in. Pure.

    Raises:
        SubmitError: We are in none, or in one that has no single step.
    """
    if "SLURM_HET_SIZE" in environ:
        raise SubmitError(f"job {environ.get('SLURM_JOB_ID')} is heterogeneous: {batch.REFUSED['hetjob']}")
    if "SLURM_JOB_ID" not in environ:
        raise SubmitError(
            "--fabric tests the nodes of the job that it runs in and this is none: `salloc --nodes=4 ...` first, or "
            "--ranks 3 for a trial on this machine"
        )
    return int(environ.get("SLURM_JOB_NUM_NODES", environ.get("SLURM_NNODES", "1")))


def srun(recipe: Recipe, size: int, folder: Path, direct: bool) -> list[str]:
    """The one step, behind the shell lines that a batch script has before its own. Pure.

    Raises:
        ConfigError: The recipe's environment cannot be had on this cluster.
    """
    python = interpreter(recipe, folder)
    mpi = recipe.cluster.mpi if direct else "none"
    words = [
        *("srun", f"--nodes={size}", f"--ntasks={size}", "--ntasks-per-node=1", "--overlap", "--cpu-bind=none"),
        *("--kill-on-bad-exit=0", "--wait=0", "--unbuffered", "--label"),
        *(*recipe.cluster.srun_args, *python.srun_args, *recipe.slurm.srun_args, f"--mpi={mpi}"),
    ]
    lines = [*batch.exports(recipe), *python.setup, *recipe.cluster.setup, *recipe.slurm.setup]
    lines.append(f"exec {shlex.join(words)} {python.command} -u -m slurm.matrix {shlex.quote(str(folder))}")
    return ["bash", "-c", "\n".join(lines)]


def local(folder: Path, rank: int) -> list[str]:
    """A process that plays a node on this machine. Pure."""
    return [sys.executable, "-u", "-m", "slurm.matrix", str(folder), str(rank)]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What the step inherits: an allocation's flags for CPUs are those of its own shell. Pure."""
    return {name: value for name, value in environ.items() if name != "SLURM_CPUS_PER_TASK"} | {
        "SLURM_EXPORT_ENV": "ALL"
    }


def run(commands: Sequence[Sequence[str]], env: Mapping[str, str], folder: Path, limit_s: float) -> list[int]:
    """Run them beside each other to their end; their exit codes. None of them outlives this call.

    Raises:
        LaunchError: They did not end in time.
    """
    with contextlib.ExitStack() as around:
        started = [
            around.enter_context(child(argv, env, folder / f"node-{n}.log", STOP_S)) for n, argv in enumerate(commands)
        ]
        deadline = time.monotonic() + limit_s
        while any(process.poll() is None for process in started):
            if time.monotonic() > deadline:
                raise LaunchError(f"the nodes were not done within {limit_s:.0f} s:\n{said(folder)}")
            time.sleep(POLL_S)
        return [process.returncode for process in started]


def said(folder: Path) -> str:
    """The last lines of every log in the folder that says anything."""
    told = []
    for file in sorted(folder.glob("*.log")):
        lines = file.read_text(errors="replace").splitlines()[-TAIL:]
        told += [f"  {file.name}: {line}" for line in lines if line.strip()]
    return "\n".join(told)


def as_json(found: Matrix, told: Verdict) -> bytes:
    """Both, for programs; `gb_per_s[a][b]` is from a to b. Pure."""
    return msgspec.json.format(msgspec.json.encode({"matrix": found, "verdict": told}))


def show(found: Matrix, told: Verdict, console: Console) -> None:
    """The two matrices, or for many nodes only their medians, and what is slow."""
    console.print(f"{len(found.names)} nodes over {escape(found.over)}")
    if len(found.names) <= WIDEST:
        console.print(table("latency, us one way", found.names, found.latency_us, "{:.1f}".format))
        console.print(
            table("bandwidth, GB/s from the row's node to the column's", found.names, found.gb_per_s, "{:.2f}".format)
        )
    else:
        console.print(f"the matrices of more than {WIDEST} nodes are wider than a terminal: see --json and --png")
    if told.latency_us is not None and told.gb_per_s is not None:
        console.print(f"median: {told.latency_us:.1f} us, {told.gb_per_s:.2f} GB/s")
    for line in (*found.errors, *told.slow):
        console.print(f"[red]slow[/] {escape(line)}" if line in told.slow else f"[red]failed[/] {escape(line)}")
    if not told.slow:
        console.print("[green]no pair is slow[/]")


def table(
    title: str, labels: Sequence[str], values: Sequence[Sequence[float | None]], form: Callable[[float], str]
) -> Table:
    """One matrix, with the nodes' names on both sides."""
    made = Table(title=title, title_justify="left")
    made.add_column()
    for label in labels:
        made.add_column(escape(label), justify="right", no_wrap=True)
    for a, row in enumerate(values):
        cells = ["" if a == b else "-" if value is None else form(value) for b, value in enumerate(row)]
        made.add_row(escape(labels[a]), *cells)
    return made


def _profile(overrides: Sequence[str], ranks: int | None) -> list[str]:
    """The profile of this machine, unless the words name one; a trial runs on the loopback of any."""
    if any(word.startswith("cluster=") for word in overrides):
        return []
    if ranks is not None:
        return ["cluster=local"]
    slurm = site.ask_slurm()
    here = site.detect(site.profiles(), socket.getfqdn(), os.environ, slurm.cluster if slurm else None)
    return [f"cluster={here}"] if here else []
