"""`python -m launch.status NAME [--json] [runs_dir=DIR]`: how a deployment is, from any shell that sees its run directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from launch import watch
from launch.errors import LaunchError
from launch.progress import endpoint_text, table
from launch.records import Phase, find


def main() -> int:
    """Print the state; 0 while the deployment is ready, 2 while it is not, 1 when it cannot be found."""
    parser = argparse.ArgumentParser(prog="python -m launch.status", description="How a deployment is.")
    parser.add_argument("name")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    try:
        run = find(arguments.runs_dir.absolute(), arguments.name)
        view = watch.look(run)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    alive = watch.where_alive(run)
    phase = view.phase if alive else Phase.STOPPED
    if arguments.json:
        members = {
            row.name: {"rank": row.rank, "host": row.host, **msgspec.to_builtins(row.record)} for row in view.rows
        }
        state = {"name": run.name, "state": phase, "job": view.job, "endpoint": view.endpoint, "members": members}
        state |= {"changes": view.changes}
        print(msgspec.json.format(msgspec.json.encode(state), indent=2).decode())
    else:
        console = Console(soft_wrap=True)
        console.print(table(f"{run.name} is {phase}{f', {alive}' if alive else ''}", view.rows if alive else []))
        for change in view.changes:
            console.print(change, markup=False, highlight=False)
        if view.failure:
            console.print(view.failure, markup=False, highlight=False)
        if alive and view.endpoint:
            console.print(endpoint_text(view.endpoint), markup=False, highlight=False)
    return 0 if phase is Phase.READY else 2


if __name__ == "__main__":
    sys.exit(main())
