"""How the frontend's processes on one port scale with cores: requests/s of 1, 2, 4, ... of them.

    python -m benchmarks.frontend.scaling [--processes 1 2 4 8] [--rounds 3] [--stride 2]

The load is the one of `benchmarks.frontend`'s `scaling`: 2000-token prompts, all different, one token each. Each frontend process
is held to a core of its own; an echo worker and two processes of load for each of them have the cores that are left, so that
nothing but the frontends is scarce. That needs about four cores for each process.

Virtual machines may hide that two of their cores are threads of one, and a clock falls when more cores are busy: so the same
processes first run a loop that shares nothing, and what that loses is printed too. `--stride` takes every second core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.frontend.__main__ import hold, play
from benchmarks.frontend.load import Load
from benchmarks.frontend.targets import Target, baton
from launch.tiny_model import make_tiny_model

BAR = 0.85
STREAMS = 32
REQUESTS = 1500
LOADS = 2
# Rounds of a loop in five seconds, by one of several processes that share nothing.
LOOP = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
ends, rounds = time.perf_counter() + 5, 0
while time.perf_counter() < ends:
    rounds += sum(range(1000)) > 0
print(rounds)
"""


def main() -> None:
    """Measure each number of processes; print requests/s and the share of k times one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--router", default="least_loaded")
    parser.add_argument("--stride", type=int, default=1, help="frontends have every so many-th core")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    one, alone = 0.0, 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_tiny_model(folder / "tiny")
        for count in given.processes:
            own = cores[:: given.stride][:count]
            if len(own) < count or count >= len(cores):
                print(f"{count} processes: {len(cores)} cores are too few", flush=True)
                continue
            loops = looped(own)
            alone = alone or loops / count
            speed, busy = measure(folder, own, cores, given.rounds, given.router)
            one = one or speed / count
            share = speed / (count * one)
            verdict = "met" if share >= BAR else "MISSED"
            print(
                f"{count:3} processes: {speed:8.0f} requests/s, {share:.2f} of {count} times one "
                f"(bar {BAR}: {verdict}); frontends busy {busy:.2f} of their cores; "
                f"a loop that shares nothing: {loops / (count * alone):.2f}",
                flush=True,
            )


def looped(cores: list[int]) -> int:
    """Rounds that a loop makes in a fixed time, on all these cores together."""
    argv = [sys.executable, "-c", LOOP]
    running = [subprocess.Popen([*argv, str(core)], stdout=subprocess.PIPE, text=True) for core in cores]
    return sum(int(process.communicate()[0]) for process in running)


def measure(folder: Path, own: list[int], cores: list[int], rounds: int, router: str) -> tuple[float, float]:
    """Requests/s of one frontend process on each of `own`, the median of the rounds, and how busy these cores were."""
    count = len(own)
    overrides = (f"frontend.router={router}", f"frontend.processes={count}", f"roles.aggregated.replicas={count}")
    slots = f"cluster.cpu_engines_per_node={count}"
    os.sched_setaffinity(0, set(cores) - set(own))  # what is started from here on has these: agents, workers and loads
    try:
        with baton(folder, *overrides, slots, name=f"scaling-{count}") as target:
            for pid, core in zip(target.frontends, own, strict=True):
                hold(pid, core)
            _together(
                target, count, Load(port=0, model="tiny", streams=STREAMS, requests=200, answer_tokens=1, seed=99)
            )
            seen = [_together(target, count, replace(_load(), seed=1000 * number)) for number in range(rounds)]
    finally:
        os.sched_setaffinity(0, cores)
    return statistics.median(speed for speed, _ in seen), statistics.median(busy for _, busy in seen)


def _load() -> Load:
    return Load(port=0, model="tiny", streams=STREAMS, requests=REQUESTS, answer_tokens=1, prompt_words=970)


def _together(target: Target, count: int, load: Load) -> tuple[float, float]:
    """Loads for `count` processes at once; requests/s of all, and the share of the frontends' cores that was used."""
    loads = [replace(load, seed=load.seed + number) for number in range(LOADS * count)]
    with ThreadPoolExecutor(len(loads)) as pool:
        seen = list(pool.map(lambda one: play(target, one), loads))
    wall = max(item.wall for item in seen)
    longest = max(seen, key=lambda item: item.wall)
    used = sum(longest.cpu[pid] for pid in target.frontends)
    return sum(item.requests for item in seen) / wall, used / (wall * count)


if __name__ == "__main__":
    main()
