"""`python -m launch.list [--json]`: all deployments and chains that were launched from here, and how they are."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec
from rich.table import Table

from launch import watch
from launch.chain import Chain
from launch.errors import LaunchError
from launch.history import duration, wide
from launch.records import Phase, every, find


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment or chain; `seconds_left` is None without a time limit, `link` without a chain.

    `state` is the endpoint's, or pending while its job waits, or stopped.
    """

    name: str
    state: str
    job: str
    where: str | None
    nodes: int
    link: int | None
    chain: str | None
    endpoint: str | None
    seconds_left: int | None


def look(runs_dir: Path, name: str) -> Item:
    """How a deployment is.

    Raises:
        LaunchError: Its folder cannot be understood.
    """
    run, chain = find(runs_dir, name), Chain(runs_dir / name)
    record = chain.record()
    job, endpoint = run.job(), run.endpoint()
    where = None if watch.is_over(run) else watch.where_alive(run)
    pending = where is not None and where.endswith("pending")
    state = "pending" if pending else str(endpoint.state if endpoint else Phase.STARTING)
    served = where is not None and endpoint is not None and not pending
    ends_at = endpoint.expires_at if served and endpoint else None
    return Item(
        name=name,
        state=state if where else str(Phase.STOPPED),
        job=job.id if job else "",
        where=where,
        nodes=job.nodes if job else 0,
        link=int(run.path.name) if record else None,
        chain=str(record.length) if record else None,
        endpoint=endpoint.url if served and endpoint else None,
        seconds_left=None if ends_at is None else max(0, round(ends_at - time.time())),
    )


def main() -> int:
    """Print them; 0 also when there are none."""
    parser = argparse.ArgumentParser(prog="python -m launch.list", description="All deployments launched from here.")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    found = []
    for path in every(arguments.runs_dir.absolute()):
        try:
            found.append(look(path.parent, path.name))
        except (LaunchError, OSError, ValueError) as error:  # one that is broken must not hide the others
            print(f"{path.name} cannot be read: {error}", file=sys.stderr)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    elif found:
        wide().print(table(found))
    else:
        print(f"nothing was launched from here ({arguments.runs_dir})")
    return 0


def table(found: list[Item]) -> Table:
    """As people read it."""
    shown = Table(header_style="bold")
    for column in ("name", "state", "job", "nodes", "link", "endpoint", "time left"):
        shown.add_column(column)
    for item in found:
        link = f"{item.link} ({item.chain})" if item.chain else ""
        left = duration(item.seconds_left)
        shown.add_row(item.name, item.state, item.job, str(item.nodes or ""), link, item.endpoint or "", left)
    return shown


if __name__ == "__main__":
    sys.exit(main())
