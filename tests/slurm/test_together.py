"""The members of an engine start in order, end together, and never meet an earlier life."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from launch.compose import read
from launch.plan import plan
from launch.records import MemberRecord, RankRecord, RunDirectory, State
from slurm.together import POLL_S, Together

HEAD, OTHER = "aggregated-0.0", "aggregated-0.1"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """The run directory of an engine over two nodes."""
    recipe = read(["+recipe=tiny_tp2_2nodes", "model.path=/nowhere"]).recipe
    directory = RunDirectory(tmp_path / "run")
    directory.prepare(recipe, plan(recipe), attempt=1)
    return directory


def member(run: RunDirectory, name: str) -> Together:
    """The agent's view of a member; its own record is written by `say`."""
    where = plan(run.recipe())
    return Together(run, 1, where.members_of("aggregated-0"), where.member(name), lambda: None)


def say(
    run: RunDirectory, name: str, state: State, generation: int, asked: int, pid: int = 1, ended: bool = False
) -> None:
    """What the agent of the other rank writes."""
    rank = int(name[-1])
    record = MemberRecord(state=state, since=0, pid=pid, generation=generation, asked=asked)
    run.put_rank(
        RankRecord(
            attempt=1,
            rank=rank,
            host="h",
            address="a",
            port_base=1,
            pid=1,
            born=1,
            heartbeat=1.0,
            members={name: record},
            ended=ended,
        )
    )


async def happens(waiting: Coroutine[Any, Any, Any]) -> bool:
    """Whether it comes to pass within a few looks at the records."""
    try:
        async with asyncio.timeout(4 * POLL_S):
            await waiting
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("state", "generation", "asked", "pid", "expected"),
    [
        pytest.param(State.STARTING, 0, 0, 0, False, id="its agent has only begun"),
        pytest.param(State.STARTING, 0, 0, 7, True, id="it runs"),
        pytest.param(State.READY, 0, 1, 7, False, id="it is dead, and the next generation asked for"),
        pytest.param(State.RESTARTING, 1, 1, 7, False, id="it has entered the next and waits"),
        pytest.param(State.LOADING, 1, 1, 8, True, id="it runs in the next"),
    ],
)
async def test_the_others_start_once_node_0_runs(
    run: RunDirectory, state: State, generation: int, asked: int, pid: int, expected: bool
) -> None:
    """In the same generation as they, which they enter when it is asked for."""
    say(run, HEAD, state, generation, asked, pid)
    follower = member(run, OTHER)

    assert await happens(follower.may_start()) is expected
    assert follower.generation == asked


@pytest.mark.parametrize(
    ("state", "generation", "asked", "ended", "expected"),
    [
        pytest.param(State.STARTING, 0, 0, False, True, id="there"),
        pytest.param(State.READY, 0, 1, False, False, id="something of an older life is left"),
        pytest.param(State.RESTARTING, 1, 1, False, True, id="nothing is left"),
        pytest.param(State.RESTARTING, 1, 1, True, False, id="its rank has ended"),
    ],
)
async def test_node_0_starts_once_all_have_entered(
    run: RunDirectory, state: State, generation: int, asked: int, ended: bool, expected: bool
) -> None:
    """So nobody meets the rendezvous of an earlier life."""
    assert not await happens(member(run, HEAD).may_start())  # the other rank has not said anything yet
    say(run, OTHER, state, generation, asked, ended=ended)

    assert await happens(member(run, HEAD).may_start()) is expected


async def test_a_member_that_ends_takes_the_others_along(run: RunDirectory) -> None:
    """Also when both end at once: they ask for the same next generation."""
    say(run, OTHER, State.READY, 0, 0)
    head = member(run, HEAD)
    assert not await happens(head.broken())

    say(run, OTHER, State.READY, 0, 1)

    async with asyncio.timeout(4 * POLL_S):
        assert await head.broken() == f"{OTHER} ended"
    head.ask()
    assert head.asked == 1
    assert not await happens(head.broken())  # it is ending by itself


async def test_a_rank_that_ended_breaks_its_engines(run: RunDirectory) -> None:
    """Its members are gone with it, whatever it last said of them."""
    say(run, OTHER, State.READY, 0, 0, ended=True)
    head = member(run, HEAD)

    async with asyncio.timeout(4 * POLL_S):
        assert await head.broken() == f"{OTHER} is lost with rank 1"
    assert head.asked == 1


async def test_whether_the_engine_ever_served_is_known_to_all(run: RunDirectory) -> None:
    """A death before that ends the deployment, a later one is repaired."""
    say(run, HEAD, State.LOADING, 0, 0)
    follower = member(run, OTHER)
    await follower.may_start()
    assert not follower.served

    say(run, HEAD, State.READY, 0, 0)
    follower.ask()
    say(run, HEAD, State.RESTARTING, 1, 1)
    follower.ask()

    assert follower.served
