"""`python -m launch.scale NAME decode=+2 [prefill=+1]`, `NAME decode=-1`, `NAME decode-3`: change a live deployment.

What is added joins with a job of its own, and the deployment is the larger for as long as that job lives. What is taken away
withdraws first, finishes what runs, and then stops.
"""

from __future__ import annotations

import argparse
import getpass
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch import ctl, elastic, watch
from launch.compose import word
from launch.elastic import Joining
from launch.errors import ConfigError, DeploymentError, LaunchError, PlanError, SubmitError
from launch.plan import Plan
from launch.recipe import Kind, Launcher, Recipe, kind_of
from launch.records import Job, Phase, RankRecord, RunDirectory, State, find
from slurm import executors
from slurm.batch import Submission
from slurm.hosts import devices_here

POLL_S = 0.5
CHANGE = re.compile(r"(?P<role>[a-z](?:[a-z0-9_-]*[a-z])?)=(?P<sign>[+-])(?P<count>[1-9][0-9]{0,3})")
ENGINE = re.compile(r"(?P<role>[a-z](?:[a-z0-9_-]*[a-z])?)-(?P<replica>[0-9]+)")
# Seconds that agents may take to see a request in the run directory, beyond the drain itself.
SEEN_AFTER_S = 120.0
ASKED_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What was asked for: engines to add, by role; how many to take away, by role; and engines to take away by name.

    Roles are called as engines are: `decode`, or `chat-decode` of the model `chat` of several.
    """

    more: Mapping[str, int]
    fewer: Mapping[str, int]
    named: tuple[str, ...]


def main() -> int:
    """Change it; 0 once it is as asked (with --no-wait: once it was asked for), 1 with a message when not."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.scale",
        description="Add engines to a live deployment (decode=+2), or take some away (decode=-1, or one by name: decode-3).",
    )
    parser.add_argument("name")
    parser.add_argument("changes", nargs="+", metavar="ROLE=+N | ROLE=-N | ENGINE")
    parser.add_argument("--force", action="store_true", help="also take away the last engine of a role")
    parser.add_argument("--no-wait", action="store_true", help="do not wait until it is done")
    parser.add_argument("--time-min", type=int, help="minutes of the job that joins; default slurm.time_min")
    parser.add_argument("--in-place-of", nargs="*", default=[], metavar="ENGINE", help="lost engines that are replaced")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    try:
        run = find(arguments.runs_dir.absolute(), arguments.name)
        asked = parse(arguments.changes)
        scale(run, asked, arguments.force, not arguments.no_wait, arguments.time_min, arguments.in_place_of)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped waiting; `python -m launch.status {arguments.name}` tells how it goes on", file=sys.stderr)
        return 130
    return 0


def parse(words: Sequence[str]) -> Change:
    """The change that the words ask for.

    Raises:
        ConfigError: One cannot be read.
    """
    more: dict[str, int] = {}
    fewer: dict[str, int] = {}
    named: list[str] = []
    for text in words:
        if found := CHANGE.fullmatch(text):
            role = found["role"]
            word(Kind, text, kind_of(role))
            if role in more or role in fewer:
                raise ConfigError(f"{role} is given twice: say by how many in all")
            (more if found["sign"] == "+" else fewer)[role] = int(found["count"])
        elif found := ENGINE.fullmatch(text):
            word(Kind, text, kind_of(text))
            named.append(text)
        else:
            raise ConfigError(f"{text!r} is no change: write decode=+2, decode=-1, or the name of an engine, decode-3")
    return Change(more=more, fewer=fewer, named=tuple(dict.fromkeys(named)))


def scale(
    run: RunDirectory, asked: Change, force: bool, wait: bool, time_min: int | None, in_place_of: Sequence[str]
) -> None:
    """Do what was asked, and stay until it is done.

    Raises:
        LaunchError: It cannot be done, or did not come about.
    """
    recipe, job, endpoint = run.recipe(), run.job(), run.endpoint()
    if job is None or watch.where_alive(run) is None:
        raise DeploymentError(f"{run.name} is not running: launch it first")
    if endpoint is None or not endpoint.state.serves:
        state = endpoint.state if endpoint else Phase.STARTING
        raise DeploymentError(f"{run.name} is {state}: wait until it is ready (`python -m launch.status {run.name}`)")
    where = elastic.plan_of(run, recipe, job.attempt)
    leaving = chosen(where, asked, force)
    if asked.more:
        why_not = refusal(recipe, job.launcher, asked.more)
        if why_not:
            raise PlanError(why_not)
    if leaving:
        shrink(run, job, where, leaving)
    joined = grow(run, recipe, job, asked.more, time_min, in_place_of) if asked.more else None
    if wait:
        await_left(run, job, where, leaving, recipe.engine.drain_s + SEEN_AFTER_S)
        if joined:
            await_joined(run, recipe, job, joined)


def refusal(recipe: Recipe, launcher: Launcher, more: Mapping[str, int]) -> str | None:
    """Why engines of these roles cannot join, or None when they can. Pure."""
    if launcher is Launcher.DEBUG:
        return "launcher=debug is one process with all ranks, and nobody joins it: launch with launcher=local"
    if launcher is Launcher.ALLOCATION:
        return (
            "launcher=allocation is one step of your own job, whose nodes are those of the plan: launch with launcher=slurm to "
            "extend the deployment by jobs, or start a second deployment in the allocation"
        )
    passes_kv = [role for role in more if kind_of(role) in (Kind.PREFILL, Kind.DECODE)]
    if passes_kv and not recipe.cluster.joins_rdma and launcher is Launcher.SLURM:
        return (
            f"on {recipe.cluster.name} processes of two jobs cannot exchange RDMA (cluster.rdma_between_jobs), so a "
            f"{passes_kv[0]} engine of another job could not pass KV cache to those of this one, and the router does not keep "
            "prefill and decode engines of one job together: launch a second deployment of the same recipe beside this one, or "
            "launch again with larger roles.*.replicas; aggregated engines may join"
        )
    return None


def chosen(where: Plan, asked: Change, force: bool) -> tuple[str, ...]:
    """The engines that have to go: those named, and of each role the newest. Pure.

    Raises:
        PlanError: There are not as many, or a role would have none left.
    """
    every = {group: where.engines(group) for group in dict.fromkeys(member.group for member in where.members)}
    names = [name for found in every.values() for name in found]
    for name in asked.named:
        if name not in names:
            raise PlanError(f"no engine {name!r} in the deployment: it has {', '.join(names)}")
    gone = list(asked.named)
    for group, count in asked.fewer.items():
        left = [name for name in every.get(group, ()) if name not in gone]
        if count > len(left):
            raise PlanError(f"{group}=-{count} takes more engines than there are: {', '.join(left) or 'none'}")
        gone += left[len(left) - count :]
    for group, found in every.items():
        if all(name in gone for name in found) and not force:
            raise PlanError(
                f"no {group} engine would be left of {', '.join(found)}, and requests that need one would fail: leave one, or "
                "say --force"
            )
    return tuple(gone)


def shrink(run: RunDirectory, job: Job, where: Plan, engines: Sequence[str]) -> None:
    """Ask engines to leave.

    The frontends tell its workers to take nothing new, at once; the file, which its agents obey, may be seen later on a
    network file system. Each of the two is enough by itself.
    """
    for engine in engines:
        elastic.leave(run, job.attempt, engine, f"asked for by {asker()}")
    leaders = [member.name for engine in engines for member in where.members_of(engine) if member.leader]

    def withdraw() -> None:
        try:
            ctl.post(run, "drain", {"members": leaders})
        except DeploymentError as error:
            print(
                f"the frontends do not answer from here ({error}); the agents stop {', '.join(engines)} by themselves"
            )

    # The answer comes when all is finished, or never, since the workers may have ended by then.
    asking = threading.Thread(target=withdraw, name="withdraw", daemon=True)
    asking.start()
    asking.join(ASKED_S)
    print(f"{', '.join(engines)} to leave")


def grow(
    run: RunDirectory,
    recipe: Recipe,
    job: Job,
    more: Mapping[str, int],
    time_min: int | None = None,
    in_place_of: Sequence[str] = (),
) -> Joining:
    """Submit the job of an extension.

    Raises:
        PlanError: It does not fit the cluster, or this machine.
        SubmitError: Slurm refused it; the extension is forgotten.
    """
    if time_min is not None:
        recipe = replace(recipe, slurm=replace(recipe.slurm, time_min=time_min))
    joined = elastic.add(run, recipe, job.attempt, more, asker(), in_place_of)
    number = joined.extension.number
    try:
        where = elastic.plan_of(run, recipe, job.attempt)
        if job.launcher is Launcher.LOCAL:
            _refuse_elsewhere(run, job)
            _refuse_without_gpus(recipe, where)
        else:
            executors.check(job.launcher, recipe, where.part(number), len(devices_here()))
        asked = Submission(run_dir=run.path, attempt=job.attempt, overrides=(), extension=number)
        submitted = executors.submit(job.launcher, recipe, where.part(number), asked)
    except LaunchError:
        elastic.drop(run, number)
        raise
    joined.job = str(submitted.job_id)
    elastic.put(run, joined)
    print(f"{', '.join(joined.extension.engines)} submitted: extension {number}, job {joined.job}")
    return joined


def await_left(run: RunDirectory, job: Job, where: Plan, engines: Sequence[str], timeout_s: float) -> None:
    """Wait until nothing is left of these engines.

    Raises:
        DeploymentError: Something is.
    """
    members = [member for engine in engines for member in where.members_of(engine)]
    deadline = time.monotonic() + timeout_s
    while members:
        ranks = run.ranks(job.attempt)
        members = [m for m in members if not _over(ranks.get(m.rank), m.name)]
        if members and time.monotonic() > deadline:
            names = ", ".join(member.name for member in members)
            raise DeploymentError(
                f"{names} had not ended after {timeout_s:.0f} s: see `python -m launch.logs {run.name} rank-{members[0].rank}`"
            )
        if members:
            time.sleep(POLL_S)
    for engine in engines:
        print(f"{engine} has left")


def await_joined(run: RunDirectory, recipe: Recipe, job: Job, joined: Joining) -> None:
    """Wait until the engines of an extension serve; while its job is queued, say so.

    Raises:
        DeploymentError: They do not, or only some; they are out of the plan.
    """
    # Nobody waits in a queue on one machine.
    deadline, told = (_patience(recipe) if job.launcher is Launcher.LOCAL else None), ""
    while True:
        gone = elastic.departures(run, job.attempt)
        members = [m for m in elastic.plan_of(run, recipe, job.attempt).part(joined.extension.number).members]
        ranks = run.ranks(job.attempt)
        states = {name: each.state for rank in ranks.values() for name, each in rank.members.items()}
        lost = [gone[name] for name in joined.extension.engines if name in gone]
        if all(states.get(member.name) is State.READY for member in members):
            if lost:
                raise DeploymentError("\n".join(f"{each.engine} did not join: {each.reason}" for each in lost))
            print(f"{', '.join(joined.extension.engines)} serve")
            return
        if watch.where_alive(run) is None:
            raise DeploymentError(f"{run.name} has ended")
        begun = any(member.rank in ranks for member in members)
        state, reason = _job_state(job, joined)
        if not begun and state in watch.ENDED_SLURM_STATES:
            elastic.give_up(run, job.attempt, joined, state)
            raise DeploymentError(
                f"job {joined.job} ended before it joined: Slurm says {state or 'nothing'} of it; "
                f"see {run.path}/batch_{joined.job}.log"
            )
        note = f"job {joined.job} is {(state or '').lower()} {reason}".strip()
        if not begun and note != told and state:
            told = note
            print(note)
        if begun and deadline is None:
            deadline = _patience(recipe)
        if deadline and time.monotonic() > deadline:
            raise DeploymentError(
                f"{', '.join(joined.extension.engines)} are not ready: `python -m launch.status {run.name}`"
            )
        time.sleep(POLL_S)


def asker() -> str:
    """Who asks, for whoever looks later."""
    return f"{getpass.getuser()} on {socket.gethostname()}"


def _patience(recipe: Recipe) -> float:
    return time.monotonic() + recipe.engine.ready_timeout_s + SEEN_AFTER_S


def _job_state(job: Job, joined: Joining) -> tuple[str | None, str]:
    return watch.slurm_state(joined.job) if job.launcher is Launcher.SLURM else (None, "")


def _over(rank: RankRecord | None, name: str) -> bool:
    """Whether nothing runs of a member, as its agent says."""
    if rank is None or rank.ended:
        return True
    record = rank.members.get(name)
    return record is None or record.state in (State.STOPPED, State.FAILED)


def _refuse_elsewhere(run: RunDirectory, job: Job) -> None:
    if job.host != socket.gethostname():
        raise SubmitError(f"{run.name} runs on {job.host} with launcher=local: run this there")


def _refuse_without_gpus(recipe: Recipe, where: Plan) -> None:
    if recipe.engine.device != "cuda":
        return
    last = max(member.rank for member in where.members)
    needed = last * where.slots_per_node + 1 + max(max(member.slots) for member in where.on(last))
    if needed > len(devices_here()):
        raise PlanError(f"the deployment would need {needed} GPUs and this machine has {len(devices_here())}")


if __name__ == "__main__":
    sys.exit(main())
