"""`python -m launch.history NAME [--json]`: every attempt and link of a name: when it was submitted, began, ended, how, at what cost."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from launch import watch
from launch.errors import LaunchError, NotFoundError
from launch.records import LINKS, Job, Life, RunDirectory, every, link_numbers


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt; times are seconds since the epoch, `link` is None outside of chains, `begin_at` is when it might begin.

    `node_hours` counts from its start, so not what it waited; None where that is not known.
    """

    link: int | None
    attempt: int
    job: str
    nodes: int
    submitted_at: float
    begin_at: float | None
    started_at: float | None
    ready_at: float | None
    ended_at: float | None
    how: str
    node_hours: float | None


def entry(
    link: int | None, job: Job, life: Life | None, where: str | None, heard_at: float | None, now: float
) -> Entry:
    """What is known of an attempt.

    Args:
        link: Its number in a chain.
        job: How it was submitted.
        life: What it said of itself; None when it never began.
        where: Where it is alive; None when it is not.
        heard_at: When one of its ranks was last heard.
        now: The time.
    """
    ended_at, how = (life.ended_at, life.how) if life else (None, "")
    if where:
        how = "running" if life else where.rpartition(", ")[2]
        ended_at = None
    elif life is None:
        how = "never began" if job.id else "was not submitted"
    elif ended_at is None:  # nobody was left to say so
        ended_at, how = heard_at, "lost"
    until = now if where else ended_at
    hours = job.nodes * (until - life.started_at) / 3600 if life and until else None
    return Entry(
        link=link,
        attempt=job.attempt,
        job=job.id,
        nodes=job.nodes,
        submitted_at=job.submitted_at,
        begin_at=job.begin_at,
        started_at=life.started_at if life else None,
        ready_at=life.ready_at if life else None,
        ended_at=ended_at,
        how=how,
        node_hours=None if hours is None else round(hours, 3),
    )


def entries(folder: Path) -> list[Entry]:
    """Everything that ever ran under a name, oldest first."""
    runs: list[tuple[int | None, RunDirectory]] = [(None, RunDirectory(folder))]
    runs += [(number, RunDirectory(folder / LINKS / str(number))) for number in link_numbers(folder)]
    found = [item for link, run in runs for item in _of_run(link, run)]
    return sorted(found, key=lambda item: item.submitted_at)


def _of_run(link: int | None, run: RunDirectory) -> Iterator[Entry]:
    latest = run.job()
    for attempt in run.attempts():
        job = run.job_of(attempt)
        if job is None:  # of a version that did not keep it, or a launch that was interrupted
            continue
        where, heard = None, [record.heartbeat for record in run.ranks(attempt).values()]
        if latest and latest.attempt == attempt and not watch.is_over(run):
            where = watch.where_alive(run)
        yield entry(link, job, run.life(attempt), where, max(heard, default=None), time.time())


def main() -> int:
    """Print it; 0, or 1 when nothing of that name was ever launched."""
    parser = argparse.ArgumentParser(prog="python -m launch.history", description="What ran under a name.")
    parser.add_argument("name")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    runs_dir = arguments.runs_dir.absolute()
    try:
        found = entries(runs_dir / arguments.name)
        if not found:
            raise NotFoundError(arguments.name, str(runs_dir), (path.name for path in every(runs_dir)))
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        wide().print(table(arguments.name, found))
    return 0


def table(name: str, found: list[Entry]) -> Table:
    """As people read it."""
    total = sum(item.node_hours or 0.0 for item in found)
    shown = Table(title=f"{name}: {total:.2f} node-hours", title_justify="left", header_style="bold")
    for column in ("link", "attempt", "job", "nodes", "submitted", "waited", "loaded in", "ended", "how", "node-hours"):
        shown.add_column(column)
    for item in found:
        waited = None if item.started_at is None else item.started_at - max(item.submitted_at, item.begin_at or 0.0)
        loaded = None if item.ready_at is None or item.started_at is None else item.ready_at - item.started_at
        shown.add_row(
            str(item.link or ""),
            str(item.attempt),
            item.job,
            str(item.nodes or ""),
            _moment(item.submitted_at),
            duration(waited),
            duration(loaded),
            _moment(item.ended_at),
            item.how,
            "" if item.node_hours is None else f"{item.node_hours:.2f}",
        )
    return shown


def wide() -> Console:
    """A console for tables: the terminal, and elsewhere lines that are not broken."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def duration(seconds: float | None) -> str:
    """Seconds as people read them: 45 s, 12 min, 3.5 h."""
    if seconds is None:
        return ""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _moment(at: float | None) -> str:
    return "" if at is None else f"{datetime.fromtimestamp(at):%m-%d %H:%M:%S}"


if __name__ == "__main__":
    sys.exit(main())
