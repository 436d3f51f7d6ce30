"""Joining moves nobody, no name is used twice, and what cannot join is refused with what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import elastic
from launch.compose import read
from launch.elastic import Departure, Following, Joining, short_of
from launch.errors import ConfigError, PlanError
from launch.plan import Extension, Part, extend, plan
from launch.recipe import Kind, Launcher, Recipe
from launch.records import RunDirectory
from launch.scale import Change, chosen, parse, refusal

SMALL = read(["+recipe=tiny_2p2d", "cluster=slurm_cpu"]).recipe
WIDE = read(["+recipe=llama70b_disagg", "cluster=slurm_gpu4"]).recipe
SLINGSHOT = read(["+recipe=llama70b_disagg", "cluster=perlmutter"]).recipe
AGGREGATED = read(["+recipe=llama70b_agg", "cluster=perlmutter"]).recipe
BOTH = {"prefill": 1, "decode": 1}

wanted = st.dictionaries(st.sampled_from(["prefill", "decode"]), st.integers(1, 4), min_size=1)


@given(st.sampled_from([SMALL, WIDE]), st.lists(wanted, max_size=4), wanted, st.data())
def test_an_extension_moves_no_member_and_takes_no_name(
    recipe: Recipe, before: list[dict[str, int]], more: dict[str, int], data: st.DataObject
) -> None:
    """Whatever came before, and whoever has left: ranks, slots, ports and names stay, and the new ones are new."""
    extensions: list[Extension] = []
    for each in before:
        extensions.append(extend(recipe, extensions, each))
    names = [member.engine for member in plan(recipe, extensions).members]
    left = data.draw(st.sets(st.sampled_from(names)))
    was, whole = plan(recipe, extensions, left), plan(recipe, extensions)

    added = extend(recipe, extensions, more)
    now = plan(recipe, [*extensions, added], left)

    new = [member for member in now.members if member.engine in added.engines]
    assert [member for member in now.members if member.engine not in added.engines] == list(was.members)
    assert {member.engine for member in new} == set(added.engines)
    assert not set(added.engines) & set(names)
    assert min(member.rank for member in new) > max(member.rank for member in whole.members)
    assert {member.rank for member in new} == {rank for rank in range(1000) if rank in now.joined[-1]}
    assert len(added.engines) == sum(more.values())
    assert now.ranks == was.ranks
    assert now.part(added.number).members == tuple(new)


def test_a_recipe_without_the_role_cannot_say_how_large_it_is() -> None:
    """The error names the roles that there are."""
    with pytest.raises(PlanError, match="no role encode: it has prefill, decode"):
        extend(SMALL, [], {Kind.ENCODE: 1})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A prepared run directory."""
    directory = RunDirectory(tmp_path / "runs" / "mine")
    directory.prepare(SMALL, plan(SMALL), attempt=1)
    return directory


def test_what_joined_and_left_is_followed_and_forgotten_with_the_attempt(run: RunDirectory) -> None:
    """Its numbers go on from extension to extension; the next attempt begins with what the recipe says."""
    following = Following(run, SMALL, 1)
    first = elastic.add(run, SMALL, 1, {Kind.DECODE: 2}, "me")
    second = elastic.add(run, SMALL, 1, BOTH, "me", ["decode-1"])
    elastic.leave(run, 1, "decode-3", "asked for by me")
    elastic.leave(run, 1, "decode-3", "a later reason")
    elastic.leave(run, 1, "decode-1", "lost", lost=True)

    assert first.extension.engines == ("decode-2", "decode-3")
    assert second.extension.engines == ("prefill-2", "decode-4")
    assert (first.extension.first_rank, second.extension.first_rank) == (4, 6)
    assert following.look().engines(Kind.DECODE) == ("decode-0", "decode-2", "decode-4")
    assert following.gone["decode-3"].reason == "asked for by me"
    assert "decode-1 was lost: lost" in elastic.told(run, 1)
    assert not elastic.joinings(run, 2)

    run.prepare(SMALL, plan(SMALL), attempt=2)

    assert elastic.plan_of(run, SMALL, 2) == plan(SMALL)


def test_a_job_that_was_refused_leaves_no_trace(run: RunDirectory) -> None:
    """Its number and its names are free again: nobody ever bore them."""
    first = elastic.add(run, SMALL, 1, {Kind.DECODE: 1}, "me")
    elastic.drop(run, first.extension.number)

    assert elastic.add(run, SMALL, 1, {Kind.DECODE: 1}, "me").extension == first.extension


@pytest.mark.parametrize(
    ("recipe", "launcher", "more", "message"),
    [
        pytest.param(SLINGSHOT, Launcher.SLURM, {Kind.DECODE: 1}, "cannot exchange RDMA.*aggregated engines may", id="KV"),
        pytest.param(SLINGSHOT, Launcher.SLURM, BOTH, "launch a second deployment", id="a pair, which nothing keeps together"),
        pytest.param(AGGREGATED, Launcher.SLURM, {Kind.AGGREGATED: 1}, None, id="whole replicas"),
        pytest.param(WIDE, Launcher.SLURM, {Kind.DECODE: 1}, None, id="a fabric that lets jobs talk"),
        pytest.param(SMALL, Launcher.LOCAL, {Kind.DECODE: 1}, None, id="this machine"),
        pytest.param(SMALL, Launcher.DEBUG, {Kind.DECODE: 1}, "launcher=local", id="one process"),
        pytest.param(SMALL, Launcher.ALLOCATION, {Kind.DECODE: 1}, "launcher=slurm", id="one step"),
    ],
)  # fmt: skip
def test_what_cannot_join_is_refused(
    recipe: Recipe, launcher: Launcher, more: dict[str, int], message: str | None
) -> None:
    """With the reason, and what to do instead."""
    import re

    why_not = refusal(recipe, launcher, more)

    assert (why_not is None) is (message is None)
    assert message is None or re.search(message, str(why_not))


def test_a_profile_may_say_that_jobs_can_talk() -> None:
    """And any other fabric that they cannot."""
    assert read(["+recipe=tiny_agg", "cluster=perlmutter", "cluster.rdma_between_jobs=true"]).recipe.cluster.joins_rdma
    assert not read(
        ["+recipe=tiny_agg", "cluster=leonardo", "cluster.rdma_between_jobs=false"]
    ).recipe.cluster.joins_rdma


@pytest.mark.parametrize(
    ("words", "force", "gone"),
    [
        (["decode=-1"], False, ("decode-3",)),
        (["decode=-2"], False, ("decode-1", "decode-3")),
        (["decode-0", "decode=-1"], False, ("decode-0", "decode-3")),
        (["decode=-3", "prefill-1"], True, ("prefill-1", "decode-0", "decode-1", "decode-3")),
    ],
)
def test_the_newest_goes_first(words: list[str], force: bool, gone: tuple[str, ...]) -> None:
    """Unless another is named; what has left already is not counted."""
    where = plan(SMALL, [extend(SMALL, [], {Kind.DECODE: 2})], ["decode-2"])

    assert chosen(where, parse(words), force) == gone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decode=-2"], "no decode engine would be left of decode-0, decode-1.*--force"),
        (["decode-0", "decode-1"], "no decode engine would be left"),
        (["decode=-3"], "takes more engines than there are: decode-0, decode-1"),
        (["decode-7"], "no engine 'decode-7'.*prefill-0, prefill-1, decode-0, decode-1"),
    ],
)
def test_a_role_is_not_left_with_none(words: list[str], message: str) -> None:
    """Nor taken away what is not there."""
    with pytest.raises(PlanError, match=message):
        chosen(plan(SMALL), parse(words), force=False)


@pytest.mark.parametrize("text", ["decode", "decode=2", "decode=+0", "decode=+", "decoed=+1", "=+1", "decode--1"])
def test_a_change_that_cannot_be_read_is_refused(text: str) -> None:
    """With the forms that can."""
    with pytest.raises(ConfigError, match=r"is no change: write decode=\+2|did you mean 'decode'"):
        parse([text])


def test_changes_may_be_mixed() -> None:
    """More of one role, fewer of another, one by name."""
    assert parse(["prefill=+2", "decode=-1", "decode-0"]) == Change(
        more={Kind.PREFILL: 2}, fewer={Kind.DECODE: 1}, named=("decode-0",)
    )


@pytest.mark.parametrize(
    ("lost", "serving", "short"),
    [
        pytest.param(["decode-1"], set(), ["decode-1"], id="nobody came yet"),
        pytest.param(["decode-1"], {"decode-2"}, [], id="another came"),
        pytest.param(["decode-1", "decode-2"], set(), ["decode-1"], id="the other was lost too, and one is missed"),
        pytest.param(["decode-0", "decode-1"], {"decode-2"}, ["decode-0"], id="one of two"),
    ],
)
def test_a_lost_engine_is_missed_until_another_serves(lost: list[str], serving: set[str], short: list[str]) -> None:
    """The deployment is degraded for as long."""
    gone = [Departure(engine=name, attempt=1, reason="lost", asked_at=0.0, lost=True) for name in lost]
    wanted = Departure(engine="prefill-1", attempt=1, reason="asked for", asked_at=0.0)
    part = Part(kind=Kind.DECODE, first_replica=2, replicas=1)
    instead = Joining(
        extension=Extension(number=1, first_rank=4, parts=(part,)),
        attempt=1,
        asked_by="rank 0",
        asked_at=0.0,
        in_place_of=["decode-1"],
    )

    assert [each.engine for each in short_of([*gone, wanted], [instead], serving)] == short
