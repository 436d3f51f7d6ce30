"""Does the whole of Baton work on GPUs? Launch the tiny model in several shapes on this machine and compare the answers.

    python -m benchmarks.gpu.first_light [--shapes agg,disagg,agg-tp2] [--prompts 24]

Needs two GPUs with vLLM 0.32 and NIXL, and nothing else of the project's environment but its base. For each shape it launches
with `python -m launch`, asks every prompt greedily, unary and streamed, and ends with Ctrl-C. It prints one row for each:
seconds until ready, answers equal to the first shape's, answers that came out otherwise when streamed, gigabytes that NIXL moved, and what was left of processes and GPU
memory afterwards. In float32 every shape must agree on every prompt. In bfloat16 they need not: the tiny model's logits reach
140, where bfloat16 rounds by half a unit, and a decode engine computes the last prompt token in another kernel than a prefill.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.deployment import gpu_mib, metric, pages, processes_of, wait_ready

SHAPES = {
    "agg": ("+recipe=tiny_agg",),
    "disagg": ("+recipe=tiny_disagg",),
    "agg-tp2": ("+recipe=tiny_agg", "roles.aggregated.tensor_parallel=2"),
}
# The tiny recipes are for the CPU; this turns them to the GPU.
GPU = (
    "cluster.gpus_per_node=2",
    "engine.device=cuda",
    "engine.args.block_size=128",
    "engine.args.enable_prefix_caching=false",  # a cached prefix is computed in other pieces
    "engine.args.kv_cache_memory_bytes=2147483648",
    "engine.env.VLLM_USE_FLASHINFER_SAMPLER='0'",
)
WORDS = [
    "river",
    "stone",
    "quick",
    "light",
    "under",
    "over",
    "green",
    "seven",
    "walk",
    "think",
    "because",
    "machine",
    "number",
    "sea",
    "bridge",
    "write",
    "code",
]


@dataclass(frozen=True, slots=True)
class Row:
    """What one shape did."""

    shape: str
    ready_s: float
    answers: tuple[str, ...]
    streamed_otherwise: int
    moved_gb: float
    left_processes: int
    left_mib: int


def main() -> None:
    """Run the shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--keep", type=Path, help="keep run directories and logs here")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        for shape in arguments.shapes.split(","):
            rows.append(run(shape, folder, arguments.prompts, arguments.dtype))
            row, first = rows[-1], rows[0]
            equal = sum(mine == theirs for mine, theirs in zip(row.answers, first.answers, strict=True))
            print(
                f"{row.shape:10} ready {row.ready_s:6.1f} s  equal to {first.shape} {equal}/{len(row.answers)}  "
                f"streamed otherwise {row.streamed_otherwise}  NIXL {row.moved_gb:8.4f} GB  left: {row.left_processes} processes, {row.left_mib} MiB of GPU memory",
                flush=True,
            )


def run(shape: str, folder: Path, count: int, dtype: str) -> Row:
    """Launch one shape, ask, stop, look what is left."""
    idle_mib = gpu_mib()
    run_dir = folder / "runs" / shape
    overrides = [
        *SHAPES[shape],
        *GPU,
        f"engine.args.dtype={dtype}",
        f"name={shape}",
        f"runs_dir={folder / 'runs'}",
        f"model.path=tiny:{folder / 'tiny'}",
    ]
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "launch", *overrides])
    try:
        endpoint = wait_ready(process, run_dir)
        ready_s = time.monotonic() - begun
        key = (run_dir / "api_key").read_text().strip()
        answers: list[str] = []
        changed = 0
        for prompt in prompts(count):
            unary, streamed = (ask(endpoint["url"], key, prompt, stream) for stream in (False, True))
            answers.append(unary)
            changed += unary != streamed
        moved = sum(metric(page, "vllm:nixl_bytes_transferred_sum") for page in pages(run_dir)) / 1e9
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    time.sleep(2)
    left = (gpu_mib() or 0) - (idle_mib or 0)
    return Row(shape, ready_s, tuple(answers), changed, moved, len(processes_of(run_dir)), left)


def ask(url: str, key: str, prompt: str, stream: bool) -> str:
    """One greedy completion of 64 tokens."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True, "stream": stream}
    request = urllib.request.Request(
        f"{url}/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        text = response.read().decode()
    if not stream:
        return str(json.loads(text)["choices"][0]["text"])
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def prompts(count: int) -> list[str]:
    """Prompts of 5 to 1,500 words, the same in every run."""
    rng = random.Random(3)
    return [" ".join(rng.choice(WORDS) for _ in range(5 + i * 1495 // max(1, count - 1) // 3)) for i in range(count)]


if __name__ == "__main__":
    main()
