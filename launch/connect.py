"""`python -m launch.connect NAME`: how to reach a deployment from outside of its cluster; with --open, reach it.

Prints a tunnel through the login host that the profile names (`cluster.login_host`) and a request to try. A tunnel leads to
one endpoint and ends with it; `--proxy` runs the gateway on loopback instead, which follows the deployment.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from launch import watch
from launch.errors import ConfigError, DeploymentError, LaunchError
from launch.progress import endpoint_text
from launch.records import Endpoint, Phase, RunDirectory, find

LOOPBACK = "127.0.0.1"


def tunnel(url: str, local_port: int, via: str) -> list[str]:
    """The command that brings an endpoint to a port of this machine.

    Args:
        url: The endpoint.
        local_port: The port here.
        via: Hosts to go through, separated by commas, the last one a login host of the cluster; each may name a user.

    Raises:
        ConfigError: `via` names no host.
    """
    *jumps, login = [host.strip() for host in via.split(",")]
    if not all((login, *jumps)) or any(host.startswith("-") for host in (login, *jumps)):
        raise ConfigError(
            f"{via!r} is no list of hosts: write login.example.org, or jump.example.org,login.example.org"
        )
    there = urlsplit(url)
    forward = f"{LOOPBACK}:{local_port}:{there.hostname}:{there.port}"
    ways = ["-J", ",".join(jumps)] if jumps else []
    # Without ExitOnForwardFailure ssh stays when the port is taken; keep-alives notice a login host that has gone.
    options = ["-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=30"]
    return ["ssh", "-N", *options, "-L", forward, *ways, login]


def through(endpoint: Endpoint, local_port: int) -> Endpoint:
    """The endpoint as it is seen at the near end of a tunnel."""
    local = f"{urlsplit(endpoint.url).scheme}://{LOOPBACK}:{local_port}/v1"
    return msgspec.structs.replace(endpoint, url=local)


def main() -> int:
    """Print it, and do it with --open or --proxy; 1 with the reason when it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m launch.connect", description="Reach a deployment from outside.")
    parser.add_argument("name")
    parser.add_argument("--open", action="store_true", help="run the tunnel, until Ctrl-C")
    parser.add_argument(
        "--proxy", action="store_true", help="run the gateway on loopback, which follows the deployment"
    )
    parser.add_argument("--port", type=int, default=0, help="port on this machine; default a free one")
    parser.add_argument("--via", help="login host, after any jump hosts and commas; default the profile's login_host")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the run directories are")
    arguments = parser.parse_args()
    runs_dir = arguments.runs_dir.absolute()
    try:
        run = find(runs_dir, arguments.name)
        if arguments.proxy:
            gateway = [sys.executable, "-m", "launch.gateway", arguments.name, "--runs-dir", str(runs_dir)]
            os.execv(sys.executable, [*gateway, "--port", str(arguments.port)])
        endpoint = serving(run, RunDirectory(runs_dir / arguments.name).endpoint())
        via = arguments.via or run.recipe().cluster.login_host or socket.getfqdn()
        port = arguments.port or free_port()
        argv = tunnel(endpoint.url, port, via)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"tunnel     {shlex.join(argv)}\n{endpoint_text(through(endpoint, port))}", flush=True)
    if arguments.open:
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            print(f"error: {argv[0]} cannot be run ({error.strerror}): is OpenSSH installed?", file=sys.stderr)
            return 1
    return 0


def serving(run: RunDirectory, endpoint: Endpoint | None) -> Endpoint:
    """The endpoint, if there is anything behind it.

    Raises:
        DeploymentError: There is not.
    """
    if endpoint is None or endpoint.state is Phase.STOPPED or watch.where_alive(run) is None:
        raise DeploymentError(f"{run.name} is not serving: see `python -m launch.status {run.name}`")
    return endpoint


def free_port() -> int:
    """A port of loopback that nobody uses at the moment."""
    with closing(socket.socket()) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
