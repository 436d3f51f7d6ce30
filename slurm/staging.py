"""Staging, seen from the agent: claim this node's copy of the model, have it filled, say how far it is.

Ranks say what they have and compute the rest: who is in the ring of a broadcast, and who reads what (slurm.stage). MPI is
started from within the one step that the agents are (slurm.mpich): the first rank of the ring publishes a command for each
node, and every agent runs its own. Without MPI the
ring is made of sockets; when a broadcast fails, every node copies what it still lacks by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import string
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from launch import elastic
from launch.plan import WEIGHTS_PORT, Plan
from launch.recipe import Recipe, Stage, Transport
from launch.records import RankRecord, RunDirectory, read_bytes, write
from slurm import children, mpich, stage
from slurm.examination import Waiting
from slurm.stage import PROGRESS, Progress, Standing
from slurm.weights import Copy, StagingError, listing

log = logging.getLogger(__name__)

POLL_S = 0.5
CLAIM_POLL_S = 1.0
STOP_GRACE_S = 5.0
MPI_PRINT_S = 20.0
# MPI's start and the first piece; on a busy machine mpi4py alone takes a second.
MPI_START_S = 60.0


class Commands(msgspec.Struct, frozen=True):
    """How each place of the ring joins MPI; none where it cannot be had, and why."""

    attempt: int
    argvs: list[list[str]] = []
    why: str = ""


class Staging:
    """The model on one node: `path` is this node's own copy, once `run` has returned; None where engines read `model.path`."""

    def __init__(
        self,
        run: RunDirectory,
        recipe: Recipe,
        plan: Plan,
        record: RankRecord,
        environ: Mapping[str, str],
        waiting: Waiting,
        stop: asyncio.Event,
        tell: Callable[[str], None],
    ) -> None:
        self.path: str | None = None
        self._run = run
        self._recipe = recipe
        self._record = record
        self._environ = environ
        self._waiting = waiting
        self._stop = stop
        self._tell = tell
        self._span = plan.span(record.rank)
        self._extension = self._span.number if self._span else 0

    async def run(self) -> None:
        """Have the model on this node's disk; returns early, with nothing promised, when a stop was asked for.

        Raises:
            StagingError: There is no room, or the model cannot be read.
        """
        asked = self._recipe.weights.stage
        if asked is Stage.NONE or self._record.rank not in self._ranks:
            return
        begun = time.monotonic()
        model = await asyncio.to_thread(listing, Path(self._recipe.model.path))
        copy = Copy(Path(scratch(self._recipe, self._environ)), model)
        claimed = copy.try_claim()
        try:
            if claimed:
                await asyncio.to_thread(_look, copy)
            self._say(copy, claimed)
            refuse_other_places(self._recipe, stage.standings(self._run, self._record.attempt))
            if asked is Stage.BROADCAST and len(self._ranks) > 1:
                try:
                    await self._broadcast(copy)
                except (StagingError, OSError) as error:
                    log.warning("%s: this node copies what it lacks from %s by itself", error, model.source)
                    copy.trust()
            if not claimed and not await self._claim(copy):
                return
            if not copy.whole() and not self._stop.is_set():
                await self._worker(copy, "local", self._command("local", str(self._record.rank)))
            if not self._stop.is_set():
                if not copy.whole():
                    raise StagingError(f"the copy in {copy.folder} is not whole: see the log weights of this rank")
                log.info("model at %s, %.1f s after the start of staging", copy.folder, time.monotonic() - begun)
                self.path = str(copy.folder)
        finally:
            copy.release()

    async def _claim(self, copy: Copy) -> bool:
        """Wait for whoever writes the copy now; False when a stop came first."""
        self._tell("somebody else is copying the model to this node")
        while not copy.try_claim():
            if self._stop.is_set():
                return False
            await asyncio.sleep(CLAIM_POLL_S)
        await asyncio.to_thread(_look, copy)
        return True

    @property
    def _ranks(self) -> list[int]:
        """The ranks of this job that need the model: not those without engines (control.dedicated), or that were left out."""
        where = elastic.plan_of(self._run, self._recipe, self._record.attempt)
        return sorted({member.rank for member in where.members if where.span(member.rank) == self._span})

    # --- with the other nodes -----------------------------------------------------------------------------------------

    async def _broadcast(self, copy: Copy) -> None:
        """Take part in the ring, if this rank is in it and somebody lacks something.

        Raises:
            StagingError: It did not come to its end.
        """
        wait_s = self._recipe.engine.ready_timeout_s
        if not await self._waiting(self._all_said, wait_s, unless_stopped=True):
            raise StagingError(f"not all of ranks {self._ranks} said within {wait_s:.0f} s what they have of the model")
        ring = stage.group(stage.standings(self._run, self._record.attempt, self._extension))
        everything = len(copy.pieces)
        lacking = [item.rank for item in ring if len(stage.numbers(item)) < everything]
        ranks = [item.rank for item in ring]
        if self._stop.is_set() or self._record.rank not in ranks or not lacking or len(ring) < 2:
            return
        place = ranks.index(self._record.rank)
        async with contextlib.AsyncExitStack() as around:
            told = await self._mpi(ring, place, around)
            if told.argvs:
                await self._worker(copy, "mpi", told.argvs[place], MPI_START_S)
                return
            log.log(
                logging.INFO if self._recipe.weights.transport is Transport.SOCKETS else logging.WARNING,
                "the model comes over sockets instead of MPI: %s",
                told.why,
            )
            argv = self._command("sockets", str(self._record.rank))
            await self._worker(copy, "sockets", argv)

    def _all_said(self) -> bool:
        return all(stage.standing(self._run, self._record.attempt, rank) for rank in self._ranks)

    def _say(self, copy: Copy, claimed: bool) -> None:
        stage.put_standing(
            self._run,
            Standing(
                attempt=self._record.attempt,
                rank=self._record.rank,
                host=self._record.host,
                address=self._record.address,
                port=self._record.port_base + WEIGHTS_PORT,
                scratch=str(copy.folder.parent),
                identity=copy.asked.identity,
                claimed=claimed,
                extension=self._extension,
                have=stage.ranges(list(copy.noted)),
            ),
        )

    async def _mpi(self, ring: Sequence[Standing], place: int, around: contextlib.AsyncExitStack) -> Commands:
        """How every place joins MPI: found out by the first, and published; mpiexec runs until `around` ends."""
        file, attempt = self._run.path / "weights" / f"mpi-{self._extension}.json", self._record.attempt
        if place:
            reading = functools.partial(_read_commands, file, attempt)
            if not await self._waiting(lambda: reading() is not None, MPI_PRINT_S + 20, unless_stopped=True):
                raise StagingError(f"rank {ring[0].rank} did not say how the model is sent")
            return reading() or Commands(attempt, why="a stop was asked for")
        why = why_no_mpi(self._recipe.weights.transport, self._environ)
        told = Commands(attempt, why=why) if why else await self._start_mpi(ring, around)
        write(file, msgspec.json.encode(told), mode=0o600)
        return told

    async def _start_mpi(self, ring: Sequence[Standing], around: contextlib.AsyncExitStack) -> Commands:
        mpiexec = mpich.find_mpiexec(self._environ)
        assert mpiexec is not None
        log_path = self._run.log_of(self._record.attempt, "weights-mpiexec")
        argv = mpich.mpiexec_argv(mpiexec, self._record.address, len(ring), self._command("mpi"))
        child = await children.start("mpiexec", argv, mpich.environment(self._environ, mpiexec), log_path)
        around.push_async_callback(child.stop, STOP_GRACE_S)
        deadline = time.monotonic() + MPI_PRINT_S
        while time.monotonic() < deadline:
            printed = mpich.printed_commands(log_path.read_text(errors="replace"))
            if printed is not None:
                return Commands(self._record.attempt, *mpich.usable(printed, len(ring)))
            await asyncio.sleep(0.05)
        return Commands(self._record.attempt, why=f"mpiexec printed no commands: {child.tail(3)}")

    # --- the process that copies --------------------------------------------------------------------------------------

    async def _worker(self, copy: Copy, how: str, argv: Sequence[str], first_word_s: float | None = None) -> None:
        """Run it to its end, and tell how far it is.

        Raises:
            StagingError: It failed, or did not begin within `first_word_s`.
        """
        file = copy.folder / PROGRESS
        file.unlink(missing_ok=True)
        log_path = self._run.log_of(self._record.attempt, f"weights-{self._record.rank}")
        env = {**self._environ, "PYTHONUNBUFFERED": "1"}
        child = await children.start("weights", argv, env, log_path)
        begun = time.monotonic()
        ended = asyncio.create_task(child.wait(), name="weights")
        try:
            while not ended.done() and not self._stop.is_set():
                await asyncio.wait([ended], timeout=POLL_S)
                told = _read_progress(file)
                if told:
                    self._tell(f"{told} ({how})")
                elif first_word_s is not None and time.monotonic() - begun > first_word_s:
                    raise StagingError(f"MPI did not begin within {first_word_s:.0f} s")
            if ended.done() and ended.result() and not self._stop.is_set():
                raise StagingError(f"copying the model ({how}) ended with {ended.result()}: {child.tail(3)}")
        finally:
            await child.stop(STOP_GRACE_S)
            await asyncio.wait([ended])
        told = _read_progress(file)
        log.info("weights (%s): %s", how, told or "nothing to do")

    def _command(self, method: str, *more: str) -> list[str]:
        words = (str(self._run.path), str(self._record.attempt), method, str(self._extension))
        return [sys.executable, "-m", "slurm.stage", *words, *more]


def scratch(recipe: Recipe, environ: Mapping[str, str]) -> str:
    """The node's own folder, with $NAME replaced as the batch shell would. Pure.

    Raises:
        StagingError: The profile has none, or names a variable that is not set here.
    """
    told = recipe.cluster.local_scratch
    if told is None:
        raise StagingError(
            "weights.stage needs cluster.local_scratch=<folder on a disk of each node>, or in its memory"
        )
    try:
        return string.Template(told).substitute(environ)
    except (KeyError, ValueError) as error:
        raise StagingError(
            f"cluster.local_scratch={told} names a variable that is not set on this node: {error}"
        ) from error


def refuse_other_places(recipe: Recipe, found: Sequence[Standing]) -> None:
    """Refuse copies at different paths where KV cache is passed on: engines take the path for a part of the model's name.

    Raises:
        StagingError: Two ranks have different folders; of ranks that say so at different times the later one finds out. Pure.
    """
    folders = {item.scratch: item.rank for item in found}
    if recipe.disaggregated and len(folders) > 1:
        told = ", ".join(f"{folder} on rank {rank}" for folder, rank in sorted(folders.items()))
        raise StagingError(
            f"prefill and decode engines need the model at the same path and cluster.local_scratch is {told}: name a folder "
            "that is called the same on all nodes, or use weights.stage=none"
        )


def why_no_mpi(transport: Transport, environ: Mapping[str, str]) -> str:
    """Why the broadcast does not go over MPI; empty when it does."""
    if transport is Transport.SOCKETS:
        return "weights.transport=sockets"
    return mpich.why_not(environ)


def _look(copy: Copy) -> None:
    if not copy.whole():
        copy.recover()
        copy.check_room()


def _read_commands(file: Path, attempt: int) -> Commands | None:
    content = read_bytes(file)
    told = None if content is None else msgspec.json.decode(content, type=Commands)
    return told if told and told.attempt == attempt else None


def _read_progress(file: Path) -> Progress | None:
    content = read_bytes(file)
    return None if content is None else msgspec.json.decode(content, type=Progress)
