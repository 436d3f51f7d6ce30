"""The steps on the 70B shape: the same load through Baton and against plain engines, aggregated and disaggregated."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.gpu.bare import bare_engines
from benchmarks.gpu.bench import Bench, play
from benchmarks.gpu.deployment import Deployment, StepError, deployed, fetch, metric
from benchmarks.gpu.load import Workload
from launch.recipe import Kind

SHAPES = ("agg", "disagg", "conditional")
LARGE_MIB = 100_000
# After the last arrival of an open loop: the queue of a prefill engine, and an answer.
TAIL_S = 25.0
CLOSED_S = 85.0
WARM_S = 15.0


def baton(bench: Bench, shape: str) -> None:
    """The load through a deployment of Baton."""
    _check_memory(bench)
    name, overrides, roles, slots = f"large-{shape}", list[str](), _roles(bench, shape), _slots(bench)
    if shape == "conditional":
        overrides = list(bench.conditional)
    launch = [*_overrides(bench, roles, slots), *overrides]
    with deployed(bench.work, name, launch, bench.env(), bench.scale.ready_s) as running:
        target = {"url": running.url, "key": running.key}
        bench.row(
            "baton70b",
            shape,
            model=bench.scale.large.name,
            ready_s=round(running.ready_s, 1),
            extra=" ".join(overrides),
        )
        _warm(bench, target)
        for work in _loads(bench, "baton70b", shape):
            before = _counters(running, shape)
            seen = play(work, target)
            bench.played("baton70b", shape, work, seen, slots, **_delta(_counters(running, shape), before))


def bare(bench: Bench, shape: str) -> None:
    """The same load against plain engines of the same arguments, driven by the client alone."""
    _check_memory(bench)
    roles, slots = _roles(bench, shape), _slots(bench)
    overrides = _overrides(bench, roles, slots)
    with bare_engines(bench.work, f"large-{shape}", overrides, bench.env(), bench.scale.ready_s) as (engines, ready_s):
        target = {
            "prefill": [engine.port for engine in engines if engine.kind is Kind.PREFILL],
            "answering": [engine.port for engine in engines if engine.kind is not Kind.PREFILL],
        }
        bench.row("bare70b", shape, model=bench.scale.large.name, ready_s=round(ready_s, 1))
        _warm(bench, target)
        for work in _loads(bench, "bare70b", shape):
            bench.played("bare70b", shape, work, play(work, target), slots)


def estimate_s(bench: Bench, start_s: float) -> float:
    """Seconds that one shape takes, its start included."""
    open_loops = len(bench.rates) * (bench.scale.load.duration_s + TAIL_S)
    return start_s + WARM_S + open_loops + (CLOSED_S if bench.closed else 0.0)


def loads(bench: Bench) -> list[tuple[Workload, float]]:
    """The workloads of a shape, each with the seconds it is expected to take."""
    base = bench.scale.load
    found = [(replace(base, name=f"{rate:g} req/s", rate=rate), base.duration_s + TAIL_S) for rate in bench.rates]
    if bench.closed:
        found.append((replace(base, name=f"closed {base.at_once}", rate=0.0), CLOSED_S))
    return found


def _loads(bench: Bench, step: str, shape: str) -> Iterator[Workload]:
    for work, expected_s in loads(bench):
        if bench.gpu and bench.left_s < expected_s:
            bench.row(
                step, shape, load=work.name, skipped=f"needs {expected_s:.0f} s and {bench.left_s:.0f} s are left"
            )
        else:
            yield work


def _warm(bench: Bench, target: dict[str, Any]) -> None:
    """A few prompts of full size, so that every engine has compiled and every pair has shaken hands.

    Raises:
        StepError: One of them failed: there is nothing to measure.
    """
    work = replace(bench.scale.load, name="warm-up", rate=0.0, count=4, at_once=2, answer_tokens=8)
    seen = play(work, target)
    errors = [item.error for item in seen if item.error]
    if errors:
        raise StepError(f"{len(errors)} of {len(seen)} warm-up requests failed: {errors[0]}")


def _roles(bench: Bench, shape: str) -> dict[str, tuple[int, int]]:
    tensor_parallel = bench.scale.large_tensor_parallel
    if shape == "agg":
        return {"aggregated": (2, tensor_parallel)}
    return {"prefill": (1, tensor_parallel), "decode": (1, tensor_parallel)}


def _slots(bench: Bench) -> int:
    return 2 * bench.scale.large_tensor_parallel


def _overrides(bench: Bench, roles: dict[str, tuple[int, int]], slots: int) -> list[str]:
    args: dict[str, str | int | float | bool] = {
        "load_format": "dummy",
        "block_size": bench.scale.block,
        "max_model_len": bench.scale.large_max_model_len,
    }
    if bench.gpu:
        args |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.92}
    return bench.overrides(bench.scale.large, roles, slots, **args)


def _check_memory(bench: Bench) -> None:
    """Fail at once on GPUs that are too small, instead of after a start of two minutes.

    Raises:
        StepError: Says what they have.
    """
    if not bench.gpu:
        return
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    have = [int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()]
    if min(have) < LARGE_MIB:
        raise StepError(f"the 70B shapes need {LARGE_MIB} MiB a GPU; these have {have}: use H200s")


def _counters(running: Deployment, shape: str) -> dict[str, float]:
    """Legs by kind, as the frontend counts them, and what NIXL moved."""
    page = fetch(running.url.removesuffix("/v1") + "/metrics", running.key)
    found = {
        f"legs_{match[1]}": float(match[2])
        for match in re.finditer(r'^baton_frontend_legs_total\{[^}]*kind="(\w+)"[^}]*\} (\S+)$', page, re.MULTILINE)
    }
    if shape != "agg":
        decode = running.page("decode-0")
        for name in ("bytes_transferred_sum", "xfer_time_seconds_sum", "num_failed_transfers_total"):
            found[name] = metric(decode, f"vllm:nixl_{name}")
    return found


def _delta(after: dict[str, float], before: dict[str, float]) -> dict[str, Any]:
    change = {name: value - before.get(name, 0.0) for name, value in after.items()}
    found: dict[str, Any] = {name: int(value) for name, value in change.items() if name.startswith("legs_")}
    if "bytes_transferred_sum" in change:
        seconds = change["xfer_time_seconds_sum"]
        found["moved_gb"] = round(change["bytes_transferred_sum"] / 1e9, 2)
        found["gb_s"] = round(change["bytes_transferred_sum"] / seconds / 1e9, 2) if seconds else 0.0
        found["failed_transfers"] = int(change["num_failed_transfers_total"])
    return found
