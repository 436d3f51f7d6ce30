"""MPI without srun and ssh: MPICH's mpiexec with the launcher `manual` prints one command for each node and waits, and whoever
is on a node already runs that node's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LIBMPI = "MPI4PY_LIBMPI"


def find_mpiexec(environ: Mapping[str, str]) -> str | None:
    """MPICH's mpiexec, beside this Python or on PATH; others know no launcher `manual`."""
    here = Path(sys.executable).parent / "mpiexec.hydra"
    return str(here) if here.exists() else shutil.which("mpiexec.hydra", path=environ.get("PATH"))


def why_not(environ: Mapping[str, str]) -> str:
    """Why MPI cannot be started like this here; empty when it can."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    if find_mpiexec(environ) is None:
        return "there is no mpiexec.hydra on PATH (pip install mpich, or the site's MPICH or Intel MPI)"
    return ""


def mpiexec_argv(mpiexec: str, address: str, size: int, command: Sequence[str]) -> list[str]:
    """One process on each of `size` nodes, which mpiexec does not reach itself: their names are only labels. Pure."""
    names = ",".join(f"place{index}" for index in range(size))
    words = [
        "-launcher",
        "manual",
        "-rmk",
        "user",
        "-localhost",
        address,
        "-hosts",
        names,
        "-ppn",
        "1",
        "-n",
        str(size),
    ]
    return [mpiexec, *words, *command]


def environment(environ: Mapping[str, str], mpiexec: str) -> dict[str, str]:
    """What the processes get: mpiexec hands its own environment on, and must not take this for a job of Slurm's MPI. Pure
    but for a look for the library that belongs to mpiexec."""
    env = {name: value for name, value in environ.items() if not name.startswith(("SLURM_", "PMI", "PMIX_"))}
    library = Path(mpiexec).parent.parent / "lib" / "libmpi.so.12"
    if library.exists():
        env.setdefault(LIBMPI, str(library))
    return env


def printed_commands(text: str) -> list[list[str]] | None:
    """The commands that mpiexec printed, once it has printed all. Pure."""
    lines = text.splitlines()
    if "HYDRA_LAUNCH_END" not in lines:
        return None
    return [shlex.split(line.partition(":")[2]) for line in lines if line.startswith("HYDRA_LAUNCH:")]


def usable(printed: list[list[str]], size: int) -> tuple[list[list[str]], str]:
    """What mpiexec printed if that is one command for each of `size` nodes; else none, and why. Pure."""
    return (printed, "") if len(printed) == size else ([], f"mpiexec wants {len(printed)} processes and not {size}")


@contextlib.contextmanager
def world(thread_level: str = "multiple") -> Iterator[Any]:
    """MPI's world, of one process for each node."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.pop("TMPDIR", None)  # that of the node where mpiexec runs
    import mpi4py

    mpi4py.rc.thread_level = thread_level
    from mpi4py import MPI

    log.info("%s", MPI.Get_library_version().splitlines()[0])
    yield MPI.COMM_WORLD
    MPI.COMM_WORLD.Barrier()
