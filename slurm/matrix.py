"""`python -m slurm.matrix FOLDER [RANK]`: one node's part in the test of all pairs of nodes, over MPI or plain sockets.

Nodes meet in a folder that all of them see: each says where it listens, the first one starts MPI (slurm.mpich) and publishes
how to join, and each leaves what it found. Whether MPI did its work is decided by all from the same files; if it did not for
one of them, all do it again over sockets. `FOLDER mpi` is a process that MPI has started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from launch.errors import LaunchError
from launch.recipe import Cluster
from launch.records import read_bytes, write
from slurm import fabric, hosts, mpich
from slurm.channels import accept, connect, exactly
from slurm.pairs import Found, opponents, rounds
from workers.runtime.logs import set_up_logging

log = logging.getLogger("slurm.matrix")

BLOCK = 4 << 20
MOST_BLOCKS = 1024
RATE_S = 0.2
WARM, MOST_TRIPS, TRIPS_S = 10, 1000, 0.1
MEET_S = 120.0
CONNECT_S = 15.0
SILENT_S = 30.0
MPI_PRINT_S = 20.0
MPI_START_S = 60.0
# A pair takes under a second; this is how long all rounds may take for each of them before MPI is given up.
ROUND_S = 4.0
POLL_S = 0.05
STOP_S = 5.0
NAME = "fabric"
COMPLAINT = f"ERROR {NAME}: "

Bytes = npt.NDArray[np.uint8]
Kind = TypeVar("Kind")


class MatrixError(LaunchError):
    """The pairs of nodes cannot be tested."""


class Asked(msgspec.Struct, kw_only=True, frozen=True):
    """What the nodes are to do: `sockets` is why not over MPI, `direct` that srun has started them as processes of MPI."""

    size: int
    cluster: Cluster
    secret: bytes
    sockets: str = ""
    direct: bool = False


class Standing(msgspec.Struct, kw_only=True, frozen=True):
    """Where a node is; `machine` is its own name for itself, which nodes of a trial share."""

    host: str
    machine: str
    address: str
    port: int


class Commands(msgspec.Struct, frozen=True):
    """How each node joins MPI; none where it cannot be had, and why."""

    argvs: list[list[str]] = []
    why: str = ""


class Meeting:
    """The folder where the nodes meet; one file for each word of each node."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def asked(self) -> Asked:
        """What is to be done.

        Raises:
            MatrixError: The folder is not what the doctor made, or this node does not see it.
        """
        content = read_bytes(self.path / "asked.json")
        if content is None:
            raise MatrixError(f"{self.path} is not seen on {_host()}: set runs_dir to a folder that all nodes share")
        return msgspec.json.decode(content, type=Asked)

    def put(self, what: str, rank: int, said: Any) -> None:
        """Say something, to everybody."""
        write(self.path / f"{what}-{rank}.json", msgspec.json.encode(said), mode=0o600)

    def get(self, what: str, rank: int, kind: type[Kind]) -> Kind | None:
        """What a node said of this, if anything."""
        content = read_bytes(self.path / f"{what}-{rank}.json")
        return None if content is None else msgspec.json.decode(content, type=kind)

    def wait(self, what: str, ranks: Sequence[int], kind: type[Kind], timeout_s: float) -> list[Kind]:
        """What all of them said.

        Raises:
            MatrixError: One of them said nothing in time.
        """
        deadline = time.monotonic() + timeout_s
        said: dict[int, Kind] = {}
        while True:
            for rank in ranks:
                if rank not in said and (word := self.get(what, rank, kind)) is not None:
                    said[rank] = word
            if len(said) == len(ranks):
                return [said[rank] for rank in ranks]
            if time.monotonic() > deadline:
                absent = ", ".join(str(rank) for rank in ranks if rank not in said)
                raise MatrixError(f"nothing ({what}) came from the nodes of rank {absent} within {timeout_s:.0f} s")
            time.sleep(POLL_S)


def main() -> int:
    """Take part; 1 when nothing could be found out, with the reason on standard output."""
    meeting = Meeting(Path(sys.argv[1]))
    os.umask(0o077)
    set_up_logging(NAME)
    try:
        if sys.argv[2:] == ["mpi"] or meeting.asked().direct:
            measure_by_mpi(meeting)
        else:
            join(meeting, int(sys.argv[2] if len(sys.argv) > 2 else os.environ["SLURM_PROCID"]))
    except (LaunchError, OSError) as error:
        log.error("%s", error)
        # MPI's end would wait for the others, which may wait for this process.
        sys.stdout.flush()
        os._exit(1)
    return 0


def join(meeting: Meeting, rank: int) -> None:
    """Meet the others, and measure with them.

    Raises:
        MatrixError: The others did not come.
        LaunchError: This node has no address for the others.
    """
    asked = meeting.asked()
    everybody = range(asked.size)
    with socket.create_server(
        (fabric.own_address(fabric.read(hosts.interfaces()), asked.cluster), 0), backlog=asked.size + 8
    ) as listener:
        address, port = listener.getsockname()
        own = Standing(host=_host(), machine=socket.gethostname(), address=address, port=port)
        meeting.put("standing", rank, own)
        standings = meeting.wait("standing", everybody, Standing, MEET_S)
        for other in standings:
            hosts.refuse_loopback((own.machine, own.address), (other.machine, other.address))
        why = asked.sockets or try_mpi(meeting, asked.size, rank, own.address)
        if why:
            (meeting.path / f"found-{rank}.json").unlink(missing_ok=True)  # MPI may have failed for others only
            found = measure_by_sockets(meeting, listener, standings, rank, asked.secret, f"sockets ({why})")
            meeting.put("found", rank, found)


# --- MPI --------------------------------------------------------------------------------------------------------------


def try_mpi(meeting: Meeting, size: int, rank: int, address: str) -> str:
    """Have all pairs measured over MPI; why it was not done, the same on every node, or nothing.

    Raises:
        MatrixError: Another node said nothing.
    """
    with contextlib.ExitStack() as around:
        if rank == 0:
            why = mpich.why_not(os.environ)
            meeting.put("commands", 0, Commands(why=why) if why else start_mpi(meeting, size, address, around))
        told = meeting.wait("commands", [0], Commands, MPI_PRINT_S + MEET_S)[0]
        if told.why:
            return told.why
        limit_s = MPI_START_S + ROUND_S * size
        with child(told.argvs[rank], os.environ, meeting.path / f"mpi-{rank}.log") as process:
            try:
                said = f"exit code {process.wait(limit_s)}"
            except subprocess.TimeoutExpired:
                said = f"not done within {limit_s:.0f} s"
        if rank == 0:
            said = complaint((meeting.path / "mpiexec.log").read_text(errors="replace")) or said
        meeting.put("ended", rank, "" if meeting.get("found", rank, Found) else said)
        ends = meeting.wait("ended", range(size), str, limit_s + MEET_S)
    failed = [f"rank {place}: {end}" for place, end in enumerate(ends) if end]
    return f"MPI failed on {failed[0]}" if failed else ""


def start_mpi(meeting: Meeting, size: int, address: str, around: contextlib.ExitStack) -> Commands:
    """Start mpiexec, which runs until `around` ends; the commands that it wants to be run."""
    mpiexec = mpich.find_mpiexec(os.environ)
    assert mpiexec is not None
    command = [sys.executable, "-m", "slurm.matrix", str(meeting.path), "mpi"]
    argv, file = mpich.mpiexec_argv(mpiexec, address, size, command), meeting.path / "mpiexec.log"
    process = around.enter_context(child(argv, mpich.environment(os.environ, mpiexec), file))
    deadline = time.monotonic() + MPI_PRINT_S
    while time.monotonic() < deadline and process.poll() is None:
        printed = mpich.printed_commands(file.read_text(errors="replace"))
        if printed is not None:
            return Commands(*mpich.usable(printed, size))
        time.sleep(POLL_S)
    last = file.read_text(errors="replace").strip().rpartition("\n")[2]
    return Commands(why=f"mpiexec printed no commands: {last or process.returncode}")


def complaint(text: str) -> str:
    """The first error of ours among what mpiexec passed on. Pure."""
    return next((line.partition(COMPLAINT)[2] for line in text.splitlines() if COMPLAINT in line), "")


@contextlib.contextmanager
def child(
    argv: Sequence[str], env: Mapping[str, str], file: Path, stop_s: float = STOP_S
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block; what it says is in the file."""
    with file.open("wb") as output:
        process = subprocess.Popen(argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(stop_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure_by_mpi(meeting: Meeting) -> None:
    """The part of this process in MPI's world; what it finds goes to the folder.

    Raises:
        MatrixError: MPI sees another number of processes than there are nodes.
    """
    asked = meeting.asked()
    with contextlib.ExitStack() as around:
        try:
            comm = around.enter_context(mpich.world("single"))
        except (ImportError, RuntimeError) as error:  # which of the two, mpi4py decides by the way it was built
            raise MatrixError(f"mpi4py cannot load MPI: {error}") from error
        if comm.size != asked.size:
            how = f"srun --mpi={asked.cluster.mpi}" if asked.direct else "mpiexec"
            raise MatrixError(f"{how} started {asked.size} processes and MPI sees {comm.size}: set cluster.mpi=null")
        from mpi4py import MPI

        known = meeting.get("standing", comm.rank, Standing)  # mpiexec hands on the environment of the first node
        found = Found(
            rank=comm.rank,
            host=known.host if known else _host(),
            address=known.address if known else "",
            over=" ".join(MPI.Get_library_version().splitlines()[0].split()),
        )
        for pairs in rounds(comm.size):
            comm.Barrier()
            for pair in pairs:
                if comm.rank in pair:
                    peer = pair[1] if comm.rank == pair[0] else pair[0]
                    measure(MpiWay(comm, peer), peer, found)
        meeting.put("found", comm.rank, found)


# --- sockets ----------------------------------------------------------------------------------------------------------


def measure_by_sockets(
    meeting: Meeting, listener: socket.socket, standings: Sequence[Standing], rank: int, secret: bytes, over: str
) -> Found:
    """Connect with all other nodes first, agree on what was reached, then measure pair by pair.

    Raises:
        MatrixError: Another node said nothing.
    """
    own = standings[rank]
    found = Found(rank=rank, host=own.host, address=own.address, over=over)
    with contextlib.ExitStack() as around:
        ways = reach(listener, standings, rank, secret, found.errors)
        for connection in ways.values():
            around.enter_context(connection)
            connection.settimeout(SILENT_S)
        meeting.put("reached", rank, sorted(ways))
        reached = meeting.wait("reached", range(len(standings)), list[int], 2 * CONNECT_S + MEET_S)
        for peer in opponents(len(standings), rank):
            if peer not in ways or rank not in reached[peer]:
                if rank < peer:
                    found.errors.setdefault(peer, "the connection did not come about")
                continue
            try:
                measure(SocketWay(ways[peer]), peer, found)
            except (OSError, EOFError) as error:
                found.errors[peer] = str(error) or type(error).__name__
                ways[peer].close()  # so that the other side does not wait
    return found


def reach(
    listener: socket.socket, standings: Sequence[Standing], rank: int, secret: bytes, errors: dict[int, str]
) -> dict[int, socket.socket]:
    """Connections by peer: to the nodes of higher rank, and from those of lower; what went wrong is added to `errors`."""
    higher = range(rank + 1, len(standings))
    with ThreadPoolExecutor(32) as pool:
        coming = pool.submit(_accept_from, listener, rank, secret)
        going = {peer: pool.submit(_connect_to, standings[peer], rank, secret) for peer in higher}
    ways = coming.result()
    for peer, each in going.items():
        try:
            ways[peer] = each.result()
        except (OSError, EOFError) as error:
            errors[peer] = f"{standings[peer].address}:{standings[peer].port}: {error or type(error).__name__}"
    return ways


def _connect_to(other: Standing, rank: int, secret: bytes) -> socket.socket:
    connection = connect((other.address, other.port), secret, CONNECT_S)
    connection.sendall(rank.to_bytes(4, "big"))
    return connection


def _accept_from(listener: socket.socket, count: int, secret: bytes) -> dict[int, socket.socket]:
    ways: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_S
    while len(ways) < count:
        try:
            connection = accept(listener, secret, deadline - time.monotonic())
        except TimeoutError:
            break  # who did not come says why
        try:
            ways[int.from_bytes(exactly(connection, bytearray(4)), "big")] = connection
        except (OSError, EOFError):
            connection.close()
    return ways


# --- one pair ---------------------------------------------------------------------------------------------------------


class Way(Protocol):
    """Both directions between this node and one other."""

    def send(self, data: Bytes) -> None:
        """Send all of it."""
        ...

    def receive(self, into: Bytes) -> None:
        """Wait until it is full."""
        ...


class MpiWay:
    """Between two ranks of a communicator; a waiting process keeps its core busy, which is what makes MPI's latency."""

    def __init__(self, comm: Any, peer: int) -> None:
        self._comm = comm
        self._peer = peer

    def send(self, data: Bytes) -> None:
        """Send all of it."""
        self._comm.Send(data, self._peer)

    def receive(self, into: Bytes) -> None:
        """Wait until it is full."""
        self._comm.Recv(into, self._peer)


class SocketWay:
    """A connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, data: Bytes) -> None:
        """Send all of it."""
        self._connection.sendall(data.data)

    def receive(self, into: Bytes) -> None:
        """Wait until it is full."""
        exactly(self._connection, into.data)


def measure(way: Way, peer: int, found: Found) -> None:
    """Measure with a peer that does the same: first the latency, then the rate from the lower rank, then the other's."""
    if found.rank < peer:
        found.latency_us[peer] = time_trips(way)
        found.gb_per_s[peer] = push(way)
        take(way)
    else:
        answer_trips(way)
        take(way)
        found.gb_per_s[peer] = push(way)


def time_trips(way: Way) -> float:
    """Microseconds one way: half of the median round trip of 8 bytes."""
    word, begun = np.ones(8, np.uint8), time.perf_counter()
    trips: list[float] = []
    while len(trips) < MOST_TRIPS and (len(trips) <= WARM or time.perf_counter() - begun < TRIPS_S):
        start = time.perf_counter()
        way.send(word)
        way.receive(word)
        trips.append(time.perf_counter() - start)
    way.send(np.zeros(8, np.uint8))
    return round(statistics.median(trips[WARM:]) / 2 * 1e6, 3)


def answer_trips(way: Way) -> None:
    """Send every word back until one is zero."""
    word = np.zeros(8, np.uint8)
    while True:
        way.receive(word)
        if not word[0]:
            return
        way.send(word)


def push(way: Way) -> float:
    """GB/s from here to the peer, until it has all: ever more blocks, until they take `RATE_S` or nearly so."""
    block, answer, count = np.ones(BLOCK, np.uint8), np.zeros(8, np.uint8), 1
    while True:
        start = time.perf_counter()
        way.send(np.array([count], ">i8").view(np.uint8))
        for _ in range(count):
            way.send(block)
        way.receive(answer)
        seconds = time.perf_counter() - start
        if seconds > RATE_S / 2 or count >= MOST_BLOCKS:
            way.send(np.zeros(8, np.uint8))
            return round(count * BLOCK / seconds / 1e9, 4)
        count = min(MOST_BLOCKS, max(2 * count, int(count * min(8.0, RATE_S / seconds))))


def take(way: Way) -> None:
    """Receive what the peer pushes."""
    block, head = np.ones(BLOCK, np.uint8), np.zeros(8, np.uint8)
    while True:
        way.receive(head)
        count = int(head.view(">i8")[0])
        if not count:
            return
        for _ in range(count):
            way.receive(block)
        way.send(head)


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


if __name__ == "__main__":
    sys.exit(main())
