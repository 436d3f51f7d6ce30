"""What all steps of the GPU benchmark share: sizes, environment, the overrides of a launch, rows, and the clock."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import shapes, weights
from benchmarks.gpu.deployment import StepError, TimeUpError, gpu_names
from benchmarks.gpu.load import Seen, Workload, figures
from benchmarks.gpu.shapes import Shape

REPOSITORY = Path(__file__).parents[2]
GIB = 1 << 30
CLEANUP_S = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large everything is: on GPUs, or tiny and on the CPU to try the script itself out."""

    device: str
    answers: Shape
    exact: Shape
    large: Shape
    large_tensor_parallel: int
    block: int
    small_block: int
    max_model_len: int
    token_lengths: tuple[int, ...]
    answer_tokens: int
    transfer_lengths: tuple[int, ...]
    transfer_times: int
    kv_bytes: int
    large_max_model_len: int
    load: Workload
    rates: tuple[float, ...]
    ready_s: float


LENGTHS = (2, 5, 16, 17, 100, 127, 128, 129, 255, 256, 300, 511, 600, 777, 1000, 1023, 1024, 1500, 2000, 2047)
GPU = Scale(
    device="cuda",
    answers=shapes.LLAMA_8B,
    exact=shapes.LLAMA_8B_SHALLOW,
    large=shapes.LLAMA_70B_FP8,
    large_tensor_parallel=1,
    block=128,
    small_block=16,
    max_model_len=32768,
    token_lengths=(*LENGTHS, 2048, 4000, 8191, 16000),
    answer_tokens=32,
    transfer_lengths=(8192, 16384, 30000),
    transfer_times=8,
    kv_bytes=12 * GIB,
    large_max_model_len=9216,
    load=Workload(name="load", prompt_tokens=8192, answer_tokens=256, vocabulary=shapes.LLAMA_70B.vocabulary),
    rates=(0.3, 0.6, 0.9),
    ready_s=400.0,
)
SMOKE = Scale(
    device="cpu",
    answers=shapes.SMALL,
    exact=shapes.SMALL,
    large=shapes.SMALL,
    large_tensor_parallel=1,
    block=32,
    small_block=64,
    max_model_len=1024,
    token_lengths=(2, 31, 32, 33, 200, 700),
    answer_tokens=8,
    transfer_lengths=(300, 600),
    transfer_times=2,
    kv_bytes=32 << 20,
    large_max_model_len=1024,
    load=Workload(
        name="load",
        prompt_tokens=200,
        answer_tokens=12,
        vocabulary=shapes.SMALL.vocabulary,
        duration_s=4,
        at_once=3,
        count=6,
    ),
    rates=(1.0,),
    ready_s=120.0,
)


@dataclass(slots=True, kw_only=True)
class Bench:
    """One run of the benchmark."""

    gpus: int
    scale: Scale
    work: Path
    out: Path
    eager: bool
    rates: tuple[float, ...]
    closed: bool
    conditional: tuple[str, ...]
    ends_at: float
    failures: int = 0
    references: dict[str, list[list[int]]] = field(default_factory=dict)
    cards: str = ""

    def __post_init__(self) -> None:
        for folder in (self.work, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        self.cards = gpu_names()

    @property
    def gpu(self) -> bool:
        """Whether there are GPUs to look at."""
        return self.scale.device == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return self.ends_at - time.monotonic()

    # --- what is launched -----------------------------------------------------------------------------------------

    def env(self, **more: str) -> dict[str, str]:
        """The environment of every launch, Baton's or bare: it is handed down to the engines."""
        cache = self.work / "cache"
        paths = [str(REPOSITORY), str(weights.install(self.work / "plugin")), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            # What the first start compiled serves the later ones.
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            # These kernels are in packages that need not be there; without them vLLM takes its own CUTLASS ones.
            "VLLM_USE_DEEP_GEMM": "0",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
            # NVLink multicast can take a shared host's GPUs out of service.
            "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
            "NCCL_NVLS_ENABLE": "0",
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
            **more,
        }

    def overrides(
        self, shape: Shape, roles: Mapping[str, tuple[int, int]], slots: int, **args: str | float | bool
    ) -> list[str]:
        """`python -m launch`'s overrides: `roles` gives replicas and tensor-parallel size, `args` vLLM's arguments."""
        found = [
            f"model.path={shapes.make(shape, self.work / 'models')}",
            "model.name=m",
            f"engine.device={self.scale.device}",
            f"engine.ready_timeout_s={self.scale.ready_s:.0f}",
            "engine.drain_s=5",
            "frontend.router=round_robin",
            # The first request of a shape may compile; a silent worker is not what is measured here.
            "frontend.stall_timeout_s=60",
        ]
        if self.gpu:
            found.append(f"cluster.gpus_per_node={slots}")
        else:
            found.append(f"cluster.cpu_engines_per_node={slots}")
            args |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": self.scale.kv_bytes}
        if self.eager:
            args["enforce_eager"] = True
        for role, (replicas, tensor_parallel) in roles.items():
            found += [f"roles.{role}.replicas={replicas}", f"roles.{role}.tensor_parallel={tensor_parallel}"]
        args = {"enable_prefix_caching": False} | args
        found += [f"engine.args.{name}={str(value).lower()}" for name, value in args.items()]
        return found

    # --- what comes out -------------------------------------------------------------------------------------------

    def row(self, step: str, shape: str, **fields: Any) -> None:
        """Write and print a row as soon as it is known."""
        whole = {
            "step": step,
            "shape": shape,
            **fields,
            "gpus": self.gpus,
            "cards": self.cards,
            "eager": self.eager or not self.gpu,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._append("rows.jsonl", json.dumps(whole))
        shown = "  ".join(f"{name} {value}" for name, value in fields.items())
        print(f"{step:10} {shape:24} {shown}", flush=True)
        self._append("table.txt", f"{step:10} {shape:24} {shown}")

    def failed(self, step: str, why: str) -> None:
        """Say what went wrong; the next step goes on."""
        self.failures += 1
        print(f"FAILED {step}: {why}", flush=True)
        self._append("failures.txt", f"=== {step}\n{why}\n")
        first = why.strip().splitlines()[0] if why.strip() else "no message"
        self.row(step, "failed", why=first[:300])

    def played(self, step: str, shape: str, work: Workload, seen: list[Seen], gpus: int, **fields: Any) -> None:
        """The row of a workload, and what every request of it saw."""
        for item in seen:
            self._append(
                "requests.jsonl", json.dumps({"step": step, "shape": shape, "load": work.name, **asdict(item)})
            )
        for error in sorted({item.error for item in seen if item.error})[:3]:
            print(f"  a request failed: {error}", flush=True)
        self.row(step, shape, load=work.name, **figures(work, seen, gpus), **fields)

    def _append(self, name: str, line: str) -> None:
        with (self.out / name).open("a") as file:
            file.write(line + "\n")


def play(work: Workload, target: Mapping[str, Any]) -> list[Seen]:
    """Play a workload from a process of its own.

    Raises:
        StepError: The client itself failed.
    """
    spec = json.dumps({"workload": asdict(work), "target": dict(target)})
    argv = [sys.executable, "-m", "benchmarks.gpu.load"]
    env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    limit = work.duration_s + work.timeout_s if work.rate else work.timeout_s * -(-work.count // work.at_once)
    try:
        done = subprocess.run(argv, input=spec, capture_output=True, text=True, check=True, env=env, timeout=limit + 30)
    except subprocess.CalledProcessError as error:
        raise StepError(f"the load client failed:\n{error.stderr[-3000:]}") from error
    except subprocess.TimeoutExpired as error:
        raise StepError(f"the load client did not end within {limit + 30:.0f} s") from error
    return [Seen(**item) for item in json.loads(done.stdout)]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise StepError in the block when it takes longer. Cleaning up ends the limit (`deployment.no_more_limit`)."""

    def expire(signum: int, frame: object) -> None:
        raise TimeUpError(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
