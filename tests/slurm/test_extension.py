"""The job of an extension is like the first one, for the nodes that join and without preparing anything."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import elastic
from launch.compose import read
from launch.elastic import Following
from launch.errors import LaunchError
from launch.plan import Member, extend, plan
from launch.recipe import Kind
from launch.records import RunDirectory
from slurm import batch, losses
from slurm.batch import Submission
from slurm.extension import Departures
from slurm.task import first_rank

RECIPE = read(["+recipe=llama70b_disagg", "cluster=leonardo", "slurm.account=a", "slurm.time_min=60"]).recipe


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A prepared run directory with an extension of one engine over two nodes."""
    directory = RunDirectory(tmp_path / "runs" / "mine")
    directory.prepare(RECIPE, plan(RECIPE), attempt=1)
    elastic.add(directory, RECIPE, 1, {Kind.DECODE: 1}, "me")
    return directory


def test_its_script_asks_for_its_nodes_and_names_it() -> None:
    """All else is as in the script of the deployment."""
    where = plan(RECIPE, [extend(RECIPE, [], {Kind.DECODE: 1})])
    first = batch.script(RECIPE, where, Submission(run_dir=Path("/runs/x"), attempt=2, overrides=())).splitlines()
    asked = Submission(run_dir=Path("/runs/x"), attempt=2, overrides=(), extension=1)
    joins = batch.script(RECIPE, where.part(1), asked).splitlines()

    assert "#SBATCH --nodes=4" in first
    assert "#SBATCH --nodes=2" in joins
    assert joins[-1].endswith("-u -m slurm.task /runs/x 2 1")
    assert not any("launch.prepare" in line for line in joins)
    same = [line for line in first if line in joins]
    assert len(same) == len(joins) - 2  # its nodes, and what srun starts


def test_its_agents_find_their_ranks_or_say_what_is_wrong(run: RunDirectory) -> None:
    """After those of the deployment; not in another attempt, and not for another job."""
    (found,) = elastic.joinings(run, 1)
    assert first_rank(run, 1, 1, "17") == 4
    found.job = "16"
    elastic.put(run, found)

    with pytest.raises(LaunchError, match="is job 16, and this is job 17"):
        first_rank(run, 1, 1, "17")
    with pytest.raises(LaunchError, match=r"no extension 1 of attempt 2: the deployment .* has ended"):
        first_rank(run, 2, 1, "16", timeout_s=0)


class Item:
    """A supervised member that notes when it was stopped."""

    def __init__(self, name: str, stopped: list[str]) -> None:
        self.name = name
        self._stopped = stopped

    def expect_end(self) -> None:
        """It does nothing by itself."""

    async def stop(self) -> None:
        """It ends."""
        self._stopped.append(self.name)


@pytest.mark.parametrize(("rank", "ends"), [(4, True), (5, True), (2, False), (3, False)])
async def test_an_engine_leaves_with_all_of_its_nodes_and_node_0_first(
    run: RunDirectory, rank: int, ends: bool
) -> None:
    """A rank that joined ends then, one of the first job does not: it has its place in the allocation."""
    following = Following(run, RECIPE, 1)
    (member,) = following.look().on(rank)
    stopped: list[str] = []
    waited: list[str] = []
    stop = asyncio.Event()

    def ended(head: Member) -> bool:
        waited.append(head.name)
        return True

    async def until(condition: Callable[[], bool], timeout_s: float) -> bool:
        return condition()

    departures = Departures(following, rank, ended, until, 1.0)
    watching = asyncio.create_task(departures.watch({member.name: Item(member.name, stopped)}, stop))
    elastic.leave(run, 1, member.engine, "a test")
    deadline = time.monotonic() + 20
    while not stopped or (ends and not stop.is_set()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert stop.is_set() is ends
    stop.set()
    await watching

    assert stopped == [member.name]
    assert departures.took(member.name)
    assert waited == ([] if member.node == 0 else [f"{member.engine}.0"])


def test_a_lost_engine_is_replaced_once_however_many_look(run: RunDirectory) -> None:
    """Not while its replacement waits or serves; again when that has gone too."""
    following = Following(run, RECIPE, 1)
    elastic.leave(run, 1, "prefill-0", "lost", lost=True)
    elastic.leave(run, 1, "decode-1", "asked for")

    def missing() -> list[str]:
        where = following.look()
        return losses.to_replace(where, list(following.gone.values()), following.joined)

    before = missing()
    instead = elastic.add(run, RECIPE, 1, {Kind.PREFILL: 1}, "rank 0", ["prefill-0"])
    waiting = missing()
    elastic.leave(run, 1, instead.extension.engines[0], "its preflight failed")

    assert (before, waiting, missing()) == (["prefill-0"], [], ["prefill-0"])


def test_engines_whose_job_ended_in_the_queue_are_waited_for_no_longer(run: RunDirectory) -> None:
    """And what they were to replace is missing again; a job that has begun, or was not submitted yet, is none of these."""
    following = Following(run, RECIPE, 1)
    elastic.leave(run, 1, "prefill-0", "rank 3 on n3 is lost", lost=True)

    def waited_for(*begun: int) -> list[str]:
        where, joined = following.look(), elastic.joinings(run, 1)
        return [each.job for each in elastic.not_begun(where, joined, following.gone, begun)]

    def missing() -> list[str]:
        where = following.look()
        return losses.to_replace(where, list(following.gone.values()), following.joined)

    instead = elastic.add(run, RECIPE, 1, {Kind.PREFILL: 1}, "rank 0", ["prefill-0"])
    unsubmitted = waited_for()
    instead.job = "7"
    elastic.put(run, instead)
    (span,) = (span for span in following.look().joined if span.number == instead.extension.number)
    waiting, begun, was_missing = waited_for(), waited_for(span.first + span.ranks - 1), missing()
    elastic.give_up(run, 1, instead, "CANCELLED")

    assert "7" not in unsubmitted
    assert "7" in waiting
    assert "7" not in begun
    assert was_missing == []
    assert "7" not in waited_for()
    assert missing() == ["prefill-0"]
    assert "job 7 ended before it joined (CANCELLED)" in elastic.told(run, 1)[-1]
