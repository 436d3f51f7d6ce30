"""`python -m launch.status NAME [--json] [--watch]`: how a deployment or a chain is, from any shell that sees its run directory."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch import watch
from launch.chain import Chain, Trouble
from launch.errors import LaunchError
from launch.handover import alive
from launch.history import duration
from launch.progress import endpoint_text, table
from launch.records import Phase, RunDirectory, find

WATCH_S = 2.0


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link that runs or waits; `serving` says that the chain's endpoint is its."""

    link: int
    job: str
    where: str
    state: Phase
    serving: bool
    url: str | None
    seconds_left: int | None


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """A chain, and why its next link could not be submitted where that is so."""

    length: str
    stopping: bool
    links: list[Link]
    trouble: Trouble | None


def links_of(chain: Chain) -> Links | None:
    """The links that run or wait, oldest first; None where this is no chain."""
    record = chain.record()
    if record is None:
        return None
    found, endpoint = [], chain.endpoint()
    for run, where in alive(chain):
        own, job = run.endpoint(), run.job()
        left = None if own is None or own.expires_at is None else max(0, round(own.expires_at - time.time()))
        found.append(
            Link(
                link=int(run.path.name),
                job=job.id if job else "",
                where=where,
                state=own.state if own else Phase.STARTING,
                serving=endpoint is not None and str(endpoint.link) == run.path.name,
                url=own.url if own else None,
                seconds_left=left,
            )
        )
    return Links(length=str(record.length), stopping=chain.stop_file.exists(), links=found, trouble=chain.trouble())


def main() -> int:
    """Print the state; 0 while the deployment is ready, 2 while it is not, 1 when it cannot be found."""
    parser = argparse.ArgumentParser(prog="python -m launch.status", description="How a deployment is.")
    parser.add_argument("name")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--watch", action="store_true", help="again and again, until it ends or Ctrl-C")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    runs_dir = arguments.runs_dir.absolute()
    try:
        if arguments.json:
            return _print_json(runs_dir, arguments.name)
        phase, shown = picture(runs_dir, arguments.name)
        if not arguments.watch:
            console = Console(soft_wrap=True)
            for part in shown:
                console.print(part, highlight=False)
        else:
            phase = _watch(runs_dir, arguments.name)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if phase is Phase.READY else 2


def picture(runs_dir: Path, name: str) -> tuple[Phase, list[RenderableType]]:
    """The state, and what a person sees of it.

    Raises:
        LaunchError: There is no such deployment.
    """
    run, links = find(runs_dir, name), links_of(Chain(runs_dir / name))
    view, place = watch.look(run), watch.where_alive(run)
    phase = view.phase if place else Phase.STOPPED
    waits = watch.slurm_state(view.job.id)[1] if place and "pending" in place else ""
    where = f", {place}{f': {waits}' if waits else ''}" if place else ""
    shown: list[RenderableType] = []
    if links:
        shown.append(links_table(name, links))
        if links.trouble:
            shown.append(Text(f"link {links.trouble.link} could not be submitted: {links.trouble.message}"))
    shown.append(table(f"{run.name} is {phase}{where}", view.rows if place else []))
    notes = [*view.changes, *watch.node_notes(run, view)] if place else view.changes
    shown += [Text(line) for line in notes]
    if view.failure:
        shown.append(Text(view.failure))
    if place and view.endpoint:
        shown.append(Text(endpoint_text(view.endpoint)))
    return phase, shown


def links_table(name: str, links: Links) -> Table:
    """The links as a table."""
    stopping = ", stopping" if links.stopping else ""
    shown = Table(title=f"{name} is a chain {links.length}{stopping}", title_justify="left", header_style="bold")
    for column in ("link", "where", "state", "serves", "endpoint", "time left"):
        shown.add_column(column)
    for link in links.links:
        serves = "yes" if link.serving else ""
        shown.add_row(str(link.link), link.where, link.state, serves, link.url or "", duration(link.seconds_left))
    return shown


def _watch(runs_dir: Path, name: str) -> Phase:
    """Show it until it ends."""
    phase = Phase.STARTING
    with Live(auto_refresh=False, console=Console()) as live:
        try:
            while True:
                phase, shown = picture(runs_dir, name)
                live.update(Group(*shown), refresh=True)
                if phase is Phase.STOPPED:
                    return phase
                time.sleep(WATCH_S)
        except KeyboardInterrupt:
            return phase


def _print_json(runs_dir: Path, name: str) -> int:
    run: RunDirectory = find(runs_dir, name)
    view = watch.look(run)
    phase = view.phase if watch.where_alive(run) else Phase.STOPPED
    members = {row.name: {"rank": row.rank, "host": row.host, **msgspec.to_builtins(row.record)} for row in view.rows}
    state = {
        "name": name,
        "state": phase,
        "job": view.job,
        "endpoint": view.endpoint,
        "members": members,
        "changes": view.changes,
        "chain": links_of(Chain(runs_dir / name)),
    }
    print(msgspec.json.format(msgspec.json.encode(state), indent=2).decode())
    return 0 if phase is Phase.READY else 2


if __name__ == "__main__":
    sys.exit(main())
