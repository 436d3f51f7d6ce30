"""`python -m launch.stop NAME`: end a deployment, from any shell that sees its run directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch import watch
from launch.errors import LaunchError
from launch.records import find

MARGIN_S = 60.0


def main() -> int:
    """Stop it; 0 once it has ended (or had before), 1 when it cannot be found or does not end."""
    parser = argparse.ArgumentParser(prog="python -m launch.stop", description="End a deployment.")
    parser.add_argument("name")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    try:
        run = find(arguments.runs_dir.absolute(), arguments.name)
        if watch.where_alive(run) is None:
            print(f"{run.name} is not running")
            return 0
        watch.stop(run, run.recipe().engine.drain_s + MARGIN_S)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{run.name} stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
