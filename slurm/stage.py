"""`python -m slurm.stage RUN_DIR ATTEMPT METHOD [RANK]`: bring the model to this node's own disk, as a process of its own.

METHOD is local, sockets or mpi; with mpi the rank follows from MPI's. The agent of the node has claimed the copy, holds its
lock, and reads how far it is from the file `PROGRESS` in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from launch.errors import LaunchError
from launch.records import RunDirectory, read_bytes, write
from slurm import mpich
from slurm.broadcast import Channel, Ring, copy_alone, from_folder, share_out
from slurm.channels import MpiChannel, socket_ring
from slurm.weights import Copy, StagingError, listing
from workers.runtime.logs import set_up_logging

log = logging.getLogger("slurm.stage")

PROGRESS = ".baton-progress"
CONNECT_S = 60.0
TELL_EVERY_S = 0.5


class Standing(msgspec.Struct, kw_only=True, frozen=True):
    """What a rank says of its copy before anything is copied; `claimed` is False where somebody else is writing it.

    `extension` is the number of the extension that the rank came with, 0 for the job itself: jobs stage each for themselves.
    `have` are the pieces that are there, as ranges (first, after the last); `identity` is the model's as this node sees it.
    """

    attempt: int
    rank: int
    host: str
    address: str
    port: int
    scratch: str
    identity: str
    claimed: bool
    extension: int = 0
    have: list[tuple[int, int]] = []


class Progress(msgspec.Struct, frozen=True):
    """Bytes that are there of how many, and those that came since this process began, in how many seconds."""

    there: int
    total: int
    came: int
    seconds: float

    def __str__(self) -> str:
        rate = self.came / self.seconds / 1e9 if self.seconds else 0.0
        return f"{self.there / 1e9:.2f} of {self.total / 1e9:.2f} GB of the model, {rate:.2f} GB/s"


def main() -> int:
    """Copy; 0 once the copy is whole, 1 with the reason in the log when it cannot be."""
    run, attempt, method, extension = RunDirectory(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    os.umask(0o077)
    set_up_logging("weights")
    try:
        if method == "mpi":
            with mpich.world() as comm:
                bring(run, attempt, group(standings(run, attempt, extension))[comm.rank].rank, method, comm)
        else:
            bring(run, attempt, int(sys.argv[5]), method)
    except (LaunchError, OSError) as error:
        log.error("%s", error)
        # Threads may wait for ever for a neighbour that has gone, and MPI's end would wait for it too.
        sys.stderr.flush()
        os._exit(1)
    return 0


def bring(run: RunDirectory, attempt: int, rank: int, method: str, comm: Any = None) -> None:
    """Bring what this rank's copy lacks.

    Raises:
        StagingError: It cannot be brought this way.
    """
    own = standing(run, attempt, rank)
    if own is None:
        raise StagingError(f"rank {rank} has not said where its copy is")
    source = Path(run.recipe().model.path)
    copy = Copy(Path(own.scratch), listing(source))
    copy.trust()
    tell = Telling(copy)
    if method == "local":
        copy_alone(copy, from_folder(source), tell.came)
    else:
        ring = group(standings(run, attempt, own.extension))
        place = [item.rank for item in ring].index(rank)
        shares = share_out(copy.pieces, [numbers(item) for item in ring])
        with channel(run, attempt, ring, place, comm) as way:
            tell.write()
            Ring(copy, from_folder(source), shares, place, len(ring), way, tell.came).run()
    if not copy.whole():
        copy.finish()
    tell.write()
    log.info("%s", tell.now())


class Telling:
    """Writes how far a copy is, now and then."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self._there = sum(piece.size for piece in copy.pieces) - sum(piece.size for piece in copy.missing())
        self._came = 0
        self._begun = self._told = time.monotonic()

    def came(self, size: int) -> None:
        """So many bytes more are there."""
        self._came += size
        if time.monotonic() - self._told > TELL_EVERY_S:
            self.write()

    def now(self) -> Progress:
        """How far it is."""
        seconds = time.monotonic() - self._begun
        return Progress(self._there + self._came, self._copy.asked.size, self._came, round(seconds, 3))

    def write(self) -> None:
        """Tell the agent."""
        self._told = time.monotonic()
        write(self._copy.folder / PROGRESS, msgspec.json.encode(self.now()))


# --- the ring ---------------------------------------------------------------------------------------------------------


def group(found: Sequence[Standing]) -> list[Standing]:
    """The ranks that make the ring, in its order: those that write a copy, of the same model as the first of them. Pure."""
    claimed = sorted((item for item in found if item.claimed), key=lambda item: item.rank)
    return [item for item in claimed if item.identity == claimed[0].identity]


def numbers(item: Standing) -> frozenset[int]:
    """The pieces that a rank has. Pure."""
    return frozenset(number for first, after in item.have for number in range(first, after))


def ranges(found: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers in short. Pure."""
    told: list[tuple[int, int]] = []
    for number in sorted(found):
        if told and told[-1][1] == number:
            told[-1] = (told[-1][0], number + 1)
        else:
            told.append((number, number + 1))
    return told


@contextlib.contextmanager
def channel(run: RunDirectory, attempt: int, ring: Sequence[Standing], place: int, comm: Any) -> Iterator[Channel]:
    """The way to both neighbours: MPI's where there is a communicator, or else sockets."""
    if comm is not None:
        yield MpiChannel(comm)
        return
    secret = hashlib.sha256(f"{run.admin_key()}/{attempt}".encode()).digest()
    with socket_ring([(item.address, item.port) for item in ring], place, secret, CONNECT_S) as way:
        yield way


# --- what ranks say ---------------------------------------------------------------------------------------------------


def put_standing(run: RunDirectory, item: Standing) -> None:
    """Say what this rank has."""
    folder = run.path / "weights"
    folder.mkdir(exist_ok=True)
    write(folder / f"{item.rank}.json", msgspec.json.encode(item))


def standing(run: RunDirectory, attempt: int, rank: int) -> Standing | None:
    """What a rank said in this attempt."""
    content = read_bytes(run.path / "weights" / f"{rank}.json")
    item = None if content is None else msgspec.json.decode(content, type=Standing)
    return item if item and item.attempt == attempt else None


def standings(run: RunDirectory, attempt: int, extension: int | None = None) -> list[Standing]:
    """What the ranks of a job said in this attempt; of all jobs without `extension`."""
    ranks = (int(path.stem) for path in (run.path / "weights").glob("[0-9]*.json"))
    found = (standing(run, attempt, rank) for rank in sorted(ranks))
    return [item for item in found if item and extension in (None, item.extension)]


if __name__ == "__main__":
    sys.exit(main())
