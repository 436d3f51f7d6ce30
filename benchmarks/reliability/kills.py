"""`python -m benchmarks.reliability.kills`: how long a killed idle worker is still asked, and a killed frontend away.

Kills echo workers one after the other, so that each has time to come back, and watches the frontend's own count of workers
that it would ask; then kills frontends, each once (one that dies again soon is started again later and later), and waits
until they accept clients: by turns when a spare process waits to take the place, and when there is none, because it was
killed before. Prints percentiles in seconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from launch.tiny_model import make_tiny_model
from tests.deployments import Deployment, deployed, processes_of

WORKERS = 8
WAIT_S = 120.0
POLL_S = 0.005


def main() -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of idle workers")
    parser.add_argument("--frontend-kills", type=int, default=5, help="at most 7")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        folder = Path(scratch)
        shape = (
            *(
                "+recipe=tiny_agg",
                "engine.backend=echo",
                f"roles.aggregated.replicas={WORKERS}",
                f"frontend.processes={1 + given.frontend_kills}",
            ),
            *(f"cluster.cpu_engines_per_node={WORKERS}", f"model.path=tiny:{make_tiny_model(folder / 'model')}"),
        )
        with deployed(folder, *shape, name="kills") as running:
            out = [idle_kill(running, f"aggregated-{number % WORKERS}") for number in range(given.kills)]
            if out:
                show("killed idle worker, out of the routing after", out)
            spared: list[float] = []
            bare: list[float] = []
            for number in range(given.frontend_kills):
                waiting = spare(running, 1 + number)
                if number % 2:
                    os.kill(waiting, signal.SIGKILL)
                (bare if number % 2 else spared).append(frontend_kill(running, 1 + number))
            show("killed frontend, answers again after, with a spare", spared)
            if bare:
                show("killed frontend, answers again after, without one", bare)
    return 0


def idle_kill(running: Deployment, victim: str) -> float:
    """Seconds that a killed worker is still in the routing."""
    wait(lambda: usable(running) == WORKERS)
    pid = running.pids()[victim]
    wait(lambda: running.pids()[victim] == pid != 0)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait(lambda: usable(running) < WORKERS)
    return time.monotonic() - killed


def frontend_kill(running: Deployment, index: int) -> float:
    """Seconds that a killed frontend accepts nobody."""
    host, _, port = running.endpoint.urls[index].removeprefix("http://").removesuffix("/v1").partition(":")
    wait(lambda: accepts(host, int(port)))
    pid = running.pids()[f"frontend-{index}"]
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not accepts(host, int(port)))
    wait(lambda: accepts(host, int(port)))
    back_s = time.monotonic() - killed
    wait(lambda: running.pids()[f"frontend-{index}"] not in (0, pid))
    return back_s


def spare(running: Deployment, number: int) -> int:
    """The process that waits to become a frontend, once it is the `number`th that does and has imported everything."""
    log = running.run.log_of(1, "spare")
    wait(lambda: log.exists() and log.read_text().count("waiting") == number)
    found = {pid for pid, line in processes_of(running.run).items() if "-m workers.frontend" in line}
    (pid,) = found - set(running.pids().values())
    return pid


def usable(running: Deployment) -> int:
    """Workers that the first frontend would ask now."""
    return int(running.metric("frontend-0", "baton_frontend_usable_workers"))


def accepts(host: str, port: int) -> bool:
    """Whether somebody listens."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def wait(condition: Callable[[], bool]) -> None:
    """Until it holds.

    Raises:
        TimeoutError: It does not.
    """
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > WAIT_S:
            raise TimeoutError(f"nothing happened for {WAIT_S:.0f} s")
        time.sleep(POLL_S)


def show(what: str, seconds: list[float]) -> None:
    """Percentiles by nearest rank."""
    ranked = sorted(seconds)
    at = {share: ranked[min(len(ranked) - 1, int(len(ranked) * share / 100))] for share in (50, 99)}
    print(f"{what}: p50 {at[50]:.3f} s, p99 {at[99]:.3f} s, longest {ranked[-1]:.3f} s of {len(ranked)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
