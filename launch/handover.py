"""`python -m launch.handover NAME`: start the next link of a chain, which takes over once it is ready.

The link that serves does this by itself in time; a person does it to begin a link early, as after a change of the environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import watch
from launch.chain import Chain, ChainRecord, Trouble, minutes
from launch.errors import DeploymentError, LaunchError, NotFoundError, SubmitError
from launch.plan import plan
from launch.recipe import Launcher, Recipe
from launch.records import CHAIN_FILE, RunDirectory, every
from launch.submission import submit
from slurm import batch, executors, hosts
from slurm.executors import Submitted

# Links that may end one after the other before they served; then the reason is in all of them.
MOST_FAILED = 3


def main() -> int:
    """Submit it; 0 when it was submitted, or had been, and 1 with the reason when not."""
    parser = argparse.ArgumentParser(prog="python -m launch.handover", description="Start the next link of a chain.")
    parser.add_argument("name")
    parser.add_argument("--after", type=int, help="only if no link after this one waits or runs")
    parser.add_argument(
        "--begin-at", type=float, help="when its job may begin, in seconds since the epoch; default now"
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    runs_dir = arguments.runs_dir.absolute()
    try:
        chain = Chain(runs_dir / arguments.name)
        record = chain.record()
        if record is None:
            raise NotFoundError(arguments.name, f"{runs_dir} that is a chain", (path.name for path in every(runs_dir)))
        if chain.stop_file.exists():
            raise DeploymentError(f"{chain.name} is stopping: launch it again")
        newest = max(chain.numbers(), default=0)
        after = newest if arguments.after is None else arguments.after
        waiting = [run for run, _ in alive(chain) if int(run.path.name) > after]
        if waiting:
            sooner = arguments.begin_at is None and hurry(waiting[-1])
            print(f"{waiting[-1].name} was submitted already{' and may begin now' if sooner else ''}")
            return 0
        if newest - after >= MOST_FAILED:
            raise DeploymentError(
                f"{newest - after} links after link {after} have ended before they served: see their logs"
            )
        run, job = next_link(chain, record, newest, arguments.begin_at)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{run.name} submitted: {record.launcher}, job {job.job_id}, logs in {run.path}/logs/latest")
    return 0


def first_link(chain: Chain, record: ChainRecord, recipe: Recipe) -> tuple[RunDirectory, Submitted]:
    """Begin a chain: make its folder and submit its first link.

    Raises:
        SubmitError: It was refused; the chain is as if never asked for.
    """
    chain.begin(record)
    try:
        return submit_link(chain, record, record.first, _trimmed(recipe, record, time.time()), None)
    except SubmitError:
        (chain.path / CHAIN_FILE).unlink()
        raise


def next_link(chain: Chain, record: ChainRecord, newest: int, begin_at: float | None) -> tuple[RunDirectory, Submitted]:
    """Submit the link after the newest, from the same recipe.

    Raises:
        SubmitError: It was refused; also told by `launch.status`.
    """
    recipe = _trimmed(chain.link(newest).recipe(), record, begin_at or time.time())
    return submit_link(chain, record, newest + 1, recipe, begin_at)


def submit_link(
    chain: Chain, record: ChainRecord, number: int, recipe: Recipe, begin_at: float | None
) -> tuple[RunDirectory, Submitted]:
    """Submit a link.

    Raises:
        LaunchError: It could not be; nothing is left of it but the chain's `trouble.json`.
    """
    run, where = chain.make_link(number), plan(recipe)
    try:
        executors.check(record.launcher, recipe, where, len(hosts.devices_here()))
        job = submit(record.launcher, recipe, where, run, record.words, begin_at)
    except SubmitError as error:
        shutil.rmtree(run.path, ignore_errors=True)
        chain.put_trouble(Trouble(link=number, message=str(error), at=time.time(), begin_at=begin_at))
        raise
    chain.put_trouble(None)
    if chain.stop_file.exists():  # somebody has stopped the chain while this was submitted
        watch.request_stop(run)
    return run, job


def _trimmed(recipe: Recipe, record: ChainRecord, begins: float) -> Recipe:
    """The recipe with a time limit that fits what is left of the chain."""
    if record.launcher is not Launcher.SLURM:
        return recipe
    limit_min = minutes(recipe.slurm.time_min, batch.shortest_min(recipe), record.length, begins)
    return dataclasses.replace(recipe, slurm=dataclasses.replace(recipe.slurm, time_min=limit_min))


def hurry(run: RunDirectory) -> bool:
    """Let a link's job begin at once that was to begin later; returns whether there was anything to change.

    Raises:
        SubmitError: Slurm refused.
    """
    job = run.job()
    if job is None or job.launcher is not Launcher.SLURM or (job.begin_at or 0.0) <= time.time():
        return False
    argv = ["scontrol", "update", f"JobId={job.id}", "StartTime=now"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise SubmitError(f"job {job.id} of {run.name} could not be told to begin now: {done.stderr.strip()}")
    job.begin_at = time.time()
    run.put_job(job)
    return True


def stop_chain(chain: Chain, timeout_s: float, links: Sequence[RunDirectory]) -> None:
    """End a chain: no further link, those that wait are cancelled, those that run finish what they have.

    Raises:
        DeploymentError: One of them still runs.
    """
    chain.stop_file.touch()
    for run in reversed(links):
        watch.request_stop(run)
    for run in links:
        watch.stop(run, timeout_s)


def alive(chain: Chain) -> list[tuple[RunDirectory, str]]:
    """The links that run or wait, oldest first, and where."""
    found = []
    for number in chain.numbers():
        run = chain.link(number)
        if watch.is_over(run):
            continue
        where = watch.where_alive(run)
        if where:
            found.append((run, where))
    return found


if __name__ == "__main__":
    sys.exit(main())
