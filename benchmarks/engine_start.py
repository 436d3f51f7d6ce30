"""What the start of one vLLM engine on the CPU costs, with and without Python's collector of cycles at work meanwhile.

    python -m benchmarks.engine_start [--rounds 2]

Starts engines of the tiny model with NIXL, of one and of two ranks, in a process of their own each. Prints the CPU seconds of
the process that serves and of those that compute, until the engine is ready, and the memory that is theirs alone: figures of
processor time, for wall times depend on what else the cores do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.tiny_model import make_tiny_model
from tests.reference import CPU_ENV

MARK = "START "
TICKS = os.sysconf("SC_CLK_TCK")
ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 4096,
    "block_size": 32,
    "kv_cache_memory_bytes": 128 << 20,
    "max_num_seqs": 32,
    "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_producer", "kv_buffer_device": "cpu"},
}


def main() -> None:
    """Start engines by turns, print each and then the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--start", nargs=3, metavar=("MODEL", "RANKS", "COLLECT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start:
        model, ranks, collect = given.start
        print(MARK + json.dumps(start(model, int(ranks), collect == "collecting")), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny_model(Path(folder) / "tiny"))
        for ranks in (1, 2):
            totals: dict[str, list[float]] = {"as it is": [], "collecting": []}
            for _ in range(given.rounds):
                for kind, found in totals.items():
                    figures = of_its_own(model, ranks, kind)
                    found.append(figures["serving_cpu_s"] + figures["computing_cpu_s"])
                    print(
                        f"ranks {ranks}  {kind:10}  " + "  ".join(f"{k} {v:7.2f}" for k, v in figures.items()),
                        flush=True,
                    )
            now, before = (statistics.median(found) for found in totals.values())
            print(
                f"ranks {ranks}: {now:.2f} CPU seconds, {now / before:.2f} of what it costs with the collector at work"
            )


def of_its_own(model: str, ranks: int, kind: str) -> dict[str, float]:
    """The figures of a start in a new process."""
    argv = [sys.executable, "-m", "benchmarks.engine_start", "--start", model, str(ranks), kind]
    env = {**os.environ, **CPU_ENV, "VLLM_HOST_IP": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
    if ranks > 1:
        del env["VLLM_ENABLE_V1_MULTIPROCESSING"]  # as in `workers.engine.arguments`
    done = subprocess.run(argv, check=False, env=env, capture_output=True, text=True, timeout=300)
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        raise SystemExit(f"the engine did not start:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(line.removeprefix(MARK))
    return figures


def start(model: str, ranks: int, collect: bool) -> dict[str, float]:
    """Start an engine in this process and end it; the figures of the start."""
    from workers.engine import vllm_engine
    from workers.engine.options import ServingOptions

    if collect:
        setattr(vllm_engine, "for_good", contextlib.nullcontext)  # noqa: B010 - it is not exported
    begun = time.monotonic()
    engine = vllm_engine.start(
        ARGUMENTS | {"model": model, "served_model_name": "tiny", "tensor_parallel_size": ranks}, ServingOptions()
    )
    wall_s = time.monotonic() - begun
    below = [pid for pid in descendants(os.getpid()) if "VLLM" in Path(f"/proc/{pid}/cmdline").read_text()]
    figures = {
        "serving_cpu_s": cpu_s(os.getpid()),
        "computing_cpu_s": sum(cpu_s(pid) for pid in below),
        "own_mib": sum(own_bytes(pid) for pid in (os.getpid(), *below)) / (1 << 20),
        "wall_s": wall_s,
    }
    engine.shutdown(5)
    return figures


def descendants(pid: int) -> Iterator[int]:
    """All processes below one."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def own_bytes(pid: int) -> int:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    main()
