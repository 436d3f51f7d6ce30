"""`python -m launch.logs NAME [member or role] [-f]`: the logs of a deployment's latest attempt."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import watch
from launch.elastic import joinings
from launch.errors import LaunchError, NotFoundError
from launch.records import RunDirectory, find
from slurm.children import tail

POLL_S = 0.3


def main() -> int:
    """Print the logs; 0, or 1 when there is no such deployment or member."""
    parser = argparse.ArgumentParser(prog="python -m launch.logs", description="The logs of a deployment.")
    parser.add_argument("name")
    parser.add_argument("member", nargs="?", help="a member, a role (decode), nats, etcd, or a rank's agent (rank-0)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the deployment ends")
    parser.add_argument("-n", "--lines", type=int, default=50, help="lines of each log to begin with")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    try:
        run = find(arguments.runs_dir.absolute(), arguments.name)
        files = choose(run, arguments.member)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, path in files.items():
        print(f"==> {name} <==\n{tail(path, arguments.lines)}")
    if arguments.follow:
        follow(run, list(files.values()))
    return 0


def choose(run: RunDirectory, member: str | None) -> dict[str, Path]:
    """Log files by name; agents are called rank-<i>, and what is before the number stands for all of them.

    Raises:
        NotFoundError: There is no log of that name or role.
    """
    folder = run.path / "logs" / "latest"
    files = {path.stem: path for path in sorted(folder.glob("*.log"))}
    job = run.job()
    joined = {each.job: each.extension.first_rank for each in joinings(run, job.attempt)} if job else {}
    for path in sorted(folder.glob("*_log.out")):
        number, task = path.name.split("_")[-3:-1]
        files[f"rank-{joined.get(number, 0) + int(task)}"] = path
    if member is None:
        return files
    if member in files:
        return {member: files[member]}
    of_role = {name: path for name, path in files.items() if re.fullmatch(rf"{re.escape(member)}-\d+(\.\d+)?", name)}
    if not of_role:
        raise NotFoundError(member, str(folder), files)
    return of_role


def follow(run: RunDirectory, files: Sequence[Path]) -> None:
    """Print what is added to the files until the deployment ends or Ctrl-C."""
    seen = {path: path.stat().st_size for path in files}
    try:
        while True:
            alive = watch.where_alive(run)
            for path, size in seen.items():
                with path.open("rb") as file:
                    file.seek(size)
                    added = file.read()
                seen[path] = size + len(added)
                sys.stdout.write(added.decode(errors="replace"))
            sys.stdout.flush()
            if alive is None:
                return
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    sys.exit(main())
