"""`python -m benchmarks.weights [--nodes 4] [--megabytes 256] [--rate-mb 32]`: staging with a shared file system of a fixed rate.

Every node is a process of this machine with a folder of its own; they read the same model through one token bucket that
they share, as nodes share the bandwidth of a parallel file system. In one run: one node that reads all of it, all nodes
that each read all of it (weights.stage=local), and a broadcast over sockets, and over MPI where it is there. What counts
is the ratio to the one node, not the seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path

from launch.recipe import Transport
from slurm import mpich, staging
from slurm.broadcast import Ring, copy_alone, from_folder, share_out
from slurm.channels import MpiChannel, socket_ring
from slurm.weights import Copy, Piece, listing

SECRET = b"benchmark"


class Bucket:
    """A file system that gives all its readers together so many bytes a second.

    `free_at` (seconds of the monotonic clock, shared by the processes) is when what was asked for so far has been given.
    """

    def __init__(self, folder: Path, rate: float, free_at: Synchronized[float]) -> None:
        self._read = from_folder(folder)
        self._rate = rate
        self._free_at = free_at

    def __call__(self, piece: Piece) -> bytearray:
        """Read a piece, in its time."""
        with self._free_at.get_lock():
            begin = max(time.monotonic(), self._free_at.value)
            self._free_at.value = end = begin + piece.size / self._rate
        content = self._read(piece)
        time.sleep(max(0.0, end - time.monotonic()))
        return content


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=256, help="size of the model")
    parser.add_argument("--rate-mb", type=float, default=32, help="MB/s of the shared file system, for all together")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        model = Path(folder) / "model"
        model.mkdir()
        content = random.Random(1).randbytes(given.megabytes * 1_000_000 // 4)
        for index in range(4):
            (model / f"{index}.safetensors").write_bytes(content)
        rows = [("one node reads all", run(alone, 1, model, given.rate_mb))]
        rows.append((f"{given.nodes} nodes read all (local)", run(alone, given.nodes, model, given.rate_mb)))
        rows.append((f"{given.nodes} nodes, broadcast over sockets", run(ring, given.nodes, model, given.rate_mb)))
        why = staging.why_no_mpi(Transport.AUTO, os.environ)
        if why:
            print(f"no MPI: {why}")
        else:
            rows.append((f"{given.nodes} nodes, broadcast over MPI", run_mpi(given.nodes, model, given.rate_mb)))
    base = rows[0][1]
    print(
        f"{given.megabytes} MB, shared file system of {given.rate_mb:g} MB/s, {given.nodes} nodes on {os.cpu_count()} cores\n"
    )
    print("| | seconds | ratio |\n|---|---|---|")
    for name, seconds in rows:
        print(f"| {name} | {seconds:.1f} | {seconds / base:.2f} |")
    return 0


def run(
    work: Callable[[Copy, Bucket, int, list[tuple[str, int]]], None], nodes: int, model: Path, rate_mb: float
) -> float:
    """Seconds from when all processes are ready until the last copy is whole."""
    context = multiprocessing.get_context("fork")
    clock, barrier = context.Value("d", 0.0), context.Barrier(nodes + 1)
    addresses = [("127.0.0.1", port) for port in _free_ports(nodes)]
    folders = [model.parent / f"n{place}" for place in range(nodes)]
    processes = [
        context.Process(
            target=_node,
            args=(work, Bucket(model, rate_mb * 1e6, clock), model, folders[place], place, addresses, barrier),
        )
        for place in range(nodes)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    begun = time.monotonic()
    for process in processes:
        process.join()
    seconds = time.monotonic() - begun
    if any(process.exitcode for process in processes):
        raise SystemExit("a node failed")
    _check(folders, model)
    return seconds


def _node(
    work: Callable[[Copy, Bucket, int, list[tuple[str, int]]], None],
    source: Bucket,
    model: Path,
    scratch: Path,
    place: int,
    addresses: list[tuple[str, int]],
    barrier: Barrier,
) -> None:
    copy = Copy(scratch, listing(model))
    if not copy.try_claim():
        raise SystemExit("claimed")
    barrier.wait()
    work(copy, source, place, addresses)
    copy.finish()


def alone(copy: Copy, source: Bucket, place: int, addresses: list[tuple[str, int]]) -> None:
    """Every node for itself."""
    copy_alone(copy, source, lambda size: None)


def ring(copy: Copy, source: Bucket, place: int, addresses: list[tuple[str, int]]) -> None:
    """All together, connections included."""
    shares = share_out(copy.pieces, [frozenset()] * len(addresses))
    with socket_ring(addresses, place, SECRET, 30) as channel:
        Ring(copy, source, shares, place, len(addresses), channel, lambda size: None).run()


def run_mpi(nodes: int, model: Path, rate_mb: float) -> float:
    """As the agents do it: mpiexec prints a command for each node, and each is run. MPI's own start is not counted.

    The bucket cannot be shared there, so that every node has its part of the rate; the shares are equal.
    """
    mpiexec = mpich.find_mpiexec(os.environ)
    assert mpiexec
    command = [sys.executable, "-m", "benchmarks.weights.mpi_node", str(model), str(rate_mb / nodes)]
    argv = mpich.mpiexec_argv(mpiexec, "127.0.0.1", nodes, command)
    env = mpich.environment(os.environ, mpiexec)
    folders = [model.parent / f"n{place}" for place in range(nodes)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout
        text = ""
        while (found := mpich.printed_commands(text)) is None:
            text += process.stdout.readline()
        proxies = [subprocess.Popen(each) for each in found]
        said = process.stdout.read()
        for proxy in proxies:
            proxy.wait()
    if process.returncode:
        raise SystemExit(f"MPI failed: {said}")
    _check(folders, model)
    return max(float(line.partition("=")[2]) for line in said.splitlines() if line.startswith("seconds="))


def mpi_node(model: Path, rate_mb: float) -> None:
    """One node of `run_mpi`."""
    with mpich.world() as comm:
        copy = Copy(model.parent / f"n{comm.rank}", listing(model))
        if not copy.try_claim():
            raise SystemExit("claimed")
        source = Bucket(model, rate_mb * 1e6, multiprocessing.Value("d", 0.0))
        shares = share_out(copy.pieces, [frozenset()] * comm.size)
        comm.Barrier()
        begun = time.monotonic()
        Ring(copy, source, shares, comm.rank, comm.size, MpiChannel(comm), lambda size: None).run()
        copy.finish()
        print(f"seconds={time.monotonic() - begun}", flush=True)


def _check(folders: list[Path], model: Path) -> None:
    """The copies are the model, and make room for the next run."""
    for folder in folders:
        copy = Copy(folder, listing(model))
        if not copy.whole() or any(
            (copy.folder / file.name).read_bytes() != (model / file.name).read_bytes() for file in copy.asked.files
        ):
            raise SystemExit(f"{folder} is not a copy of the model")
        shutil.rmtree(folder)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
