"""`python -m launch.stop NAME`: end a deployment or a chain, from any shell that sees its run directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch import watch
from launch.chain import Chain
from launch.errors import LaunchError
from launch.handover import alive, stop_chain
from launch.records import find

MARGIN_S = 60.0


def main() -> int:
    """Stop it; 0 once it has ended (or had before), 1 when it cannot be found or does not end."""
    parser = argparse.ArgumentParser(prog="python -m launch.stop", description="End a deployment or a chain.")
    parser.add_argument("name")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    runs_dir, name = arguments.runs_dir.absolute(), arguments.name
    try:
        run = find(runs_dir, name)
        chain = Chain(runs_dir / name)
        timeout_s = run.recipe().engine.drain_s + MARGIN_S
        if chain.record() is not None:
            running = _stop_chain(chain, timeout_s)
        else:
            running = watch.where_alive(run) is not None
            if running:
                watch.stop(run, timeout_s)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{name} stopped" if running else f"{name} is not running")
    return 0


def _stop_chain(chain: Chain, timeout_s: float) -> bool:
    """End all links; returns whether there were any."""
    found = False
    chain.stop_file.touch()
    # A link may have been on its way to Slurm when the chain was asked to stop: so look again.
    while links := [run for run, _ in alive(chain)]:
        found = True
        stop_chain(chain, timeout_s, links)
    return found


if __name__ == "__main__":
    sys.exit(main())
