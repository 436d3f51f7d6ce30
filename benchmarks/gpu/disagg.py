"""Disaggregated serving on GPUs: is it right, how fast does the KV cache move, and what does Baton cost?

    python -m benchmarks.gpu.disagg --gpus 2 --steps tokens,mismatch,sleep,transfer,baton70b,bare70b --out DIR

Needs one machine with 2 GPUs (or 4), vLLM 0.32 and NIXL, no network and no weights: models are made in the shapes of Llama
8B and 70B. Steps are independent. Every row is printed and written to DIR/rows.jsonl as soon as it is known; what fails is
said, with the end of the engines' logs, and the next step goes on. Engines of different stages never run at the same time.
`python -m benchmarks.gpu.report DIR` makes the tables of docs/gpu.md from the rows. `--smoke` does all of it on the CPU with
a tiny model, to try the script itself.

    tokens    answers of prefill + decode engines equal to one engine's: bfloat16, and exactly in float32
    mismatch  the same with a prefill on one GPU and a decode on two, and with both on two
    sleep     GPU memory before, during and after sleep, and equal answers
    parallel  the same answers from engines over two GPUs: pipeline, tensor, data and expert parallel, on one node and two
    transfer  what NIXL moves a second, by vLLM's own counters
    baton70b  8,192-token prompts, open and closed loop: through Baton
    bare70b   the same load against plain engines
"""

from __future__ import annotations

import argparse
import functools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.gpu import shapes, steps_8b, steps_70b, steps_parallel
from benchmarks.gpu.bench import CLEANUP_S, GPU, SMOKE, Bench, Scale, time_limit
from benchmarks.gpu.deployment import StepError, end_leftovers

STEPS = ("tokens", "mismatch", "parallel", "sleep", "transfer", "baton70b", "bare70b")

LARGE = {"fp8": shapes.LLAMA_70B_FP8, "half": shapes.LLAMA_70B_HALF, "bf16": shapes.LLAMA_70B}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One start of engines and all that the chosen steps do with it."""

    name: str
    step: str
    expected_s: float
    limit_s: float
    run: Callable[[Bench], None]


def main() -> int:
    """Run the stages; 0 when all were run and none failed."""
    arguments = _parser().parse_args()
    bench = _bench(arguments)
    steps = frozenset(arguments.steps.split(","))
    unknown = steps - set(STEPS)
    if unknown:
        raise SystemExit(f"--steps: {', '.join(sorted(unknown))} unknown; there are {', '.join(STEPS)}")
    found = stages(bench, steps, arguments.shapes.split(","), [item for item in arguments.tries.split(";") if item])
    print(f"{bench.cards}; {len(found)} stages, about {sum(item.expected_s for item in found):.0f} s:")
    for item in found:
        print(f"  {item.name:22} {item.expected_s:5.0f} s")
    if arguments.plan:
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    for folder in ("runs", "bare"):
        end_leftovers(bench.work / folder)
    for item in found:
        run(bench, item)
    print(f"done; {bench.failures} failed or were left out; rows in {bench.out}", flush=True)
    return min(1, bench.failures)


def _interrupt(signum: int, frame: object) -> None:
    """End as with Ctrl-C, so that engines are ended too."""
    raise KeyboardInterrupt


def run(bench: Bench, stage: Stage) -> None:
    """Run one stage within its time; what fails is said, and so is what there is no time for."""
    left = bench.left_s - CLEANUP_S
    if left < stage.expected_s * 0.6:
        bench.failed(stage.step, f"{stage.name} left out: about {stage.expected_s:.0f} s needed, {left:.0f} s left")
        return
    begun = time.monotonic()
    print(f"--- {stage.name}, {left:.0f} s left", flush=True)
    try:
        with time_limit(min(stage.limit_s, left)):
            stage.run(bench)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - nobody can look again on a rented machine: say it, go on
        bench.failed(
            stage.step, f"{stage.name}: {error}" if isinstance(error, StepError) else f"{stage.name}: {error!r}"
        )
    finally:
        print(f"--- {stage.name} took {time.monotonic() - begun:.0f} s", flush=True)


def stages(bench: Bench, steps: frozenset[str], large_shapes: list[str], tries: list[str]) -> list[Stage]:
    """What the chosen steps need, cheapest first; steps that can share engines do."""
    small_s = (45.0 if bench.eager else 90.0) if bench.gpu else 35.0
    asks_s = 45.0 if bench.gpu else 10.0
    large_s = (90.0 if bench.eager else 150.0) if bench.gpu else 35.0

    def small(name: str, step: str, expected_s: float, work: Callable[[Bench, frozenset[str]], None]) -> Stage:
        return Stage(
            name=name,
            step=step,
            expected_s=expected_s,
            limit_s=3 * expected_s,
            run=functools.partial(_with_steps, work, steps),
        )

    found = []
    if steps & {"tokens", "mismatch"}:
        found.append(small("agg float32", "tokens", small_s + asks_s, steps_8b.exact_aggregated))
    if "tokens" in steps:
        found.append(small("disagg float32", "tokens", small_s + asks_s, steps_8b.exact_disaggregated))
    if "mismatch" in steps:
        found.append(small("mismatch", "mismatch", small_s + asks_s, steps_8b.mismatch))
        if bench.gpu:  # four engine processes are too many for the cores that try the script
            found.append(small("both TP2", "mismatch", small_s + asks_s, steps_8b.both_tensor_parallel))
    if "parallel" in steps and bench.gpu:  # vLLM 0.32 has none of it on the CPU but tensor parallel
        found.append(small("experts float32", "parallel", small_s + asks_s, steps_parallel.one_gpu))
        for layout in steps_parallel.LAYOUTS:
            work_parallel = functools.partial(steps_parallel.compare, layout)
            found.append(small(layout.name[:22], "parallel", small_s + asks_s, work_parallel))
    if steps & {"tokens", "sleep"}:
        step = "tokens" if "tokens" in steps else "sleep"
        found.append(small("agg bfloat16", step, small_s + asks_s + 20, steps_8b.aggregated))
    if steps & {"tokens", "transfer"}:
        step = "transfer" if "transfer" in steps else "tokens"
        found.append(small("disagg bfloat16", step, small_s + asks_s, steps_8b.disaggregated))
    if "transfer" in steps:
        found.append(small("disagg small blocks", "transfer", small_s + 20, steps_8b.small_blocks))
        for text in tries:
            work = functools.partial(_trial, text)
            found.append(small(f"try {text}"[:22], "transfer", small_s + 20, work))
    for shape in large_shapes:
        # A conditional shape is nothing that a plain client could do.
        for step, work_large in (("baton70b", steps_70b.baton), ("bare70b", steps_70b.bare)):
            if step not in steps or (shape == "conditional" and (step == "bare70b" or not bench.conditional)):
                continue
            expected_s = steps_70b.estimate_s(bench, large_s)
            found.append(
                Stage(
                    name=f"{step} {shape}",
                    step=step,
                    expected_s=expected_s,
                    limit_s=2 * expected_s,
                    run=functools.partial(_with_shape, work_large, shape),
                )
            )
    return found


def _with_steps(work: Callable[[Bench, frozenset[str]], None], steps: frozenset[str], bench: Bench) -> None:
    work(bench, steps)


def _with_shape(work: Callable[[Bench, str], None], shape: str, bench: Bench) -> None:
    work(bench, shape)


def _trial(text: str, bench: Bench, steps: frozenset[str]) -> None:
    steps_8b.trial(bench, text)


def _bench(arguments: argparse.Namespace) -> Bench:
    scale: Scale = SMOKE if arguments.smoke else GPU
    if not arguments.smoke:
        # Four GPUs as in the baseline table: bfloat16, two GPUs an engine.
        large = arguments.large or ("bf16" if arguments.gpus >= 4 else "fp8")
        scale = replace(scale, large=LARGE[large], large_tensor_parallel=2 if large == "bf16" else 1)
    rates = scale.rates
    if arguments.only_rates:
        rates = tuple(float(rate) for rate in arguments.only_rates.split(","))
    return Bench(
        gpus=arguments.gpus,
        scale=replace(scale, load=replace(scale.load, duration_s=arguments.duration_s or scale.load.duration_s)),
        work=arguments.work.absolute(),
        out=arguments.out.absolute(),
        eager=arguments.eager,
        rates=rates,
        closed=not arguments.no_closed,
        conditional=tuple(arguments.conditional.split()),
        ends_at=time.monotonic() + arguments.budget_s,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, default=2, help="2: 70B in FP8, one GPU an engine; 4: in bfloat16, two GPUs an engine")
    add("--steps", default=",".join(STEPS), help=f"of {','.join(STEPS)}")
    add("--shapes", default=",".join(steps_70b.SHAPES), help=f"of the 70B steps: {','.join(steps_70b.SHAPES)}")
    add(
        "--large", choices=list(LARGE), help="70B shape: fp8 (2 GPUs), bf16 (4 GPUs), half: 40 of 80 layers in bfloat16"
    )
    add("--out", type=Path, required=True, help="rows.jsonl, requests.jsonl, table.txt, failures.txt; appended to")
    add("--work", type=Path, default=Path("/tmp/baton-gpu"), help="models, run directories, logs and compile caches")
    add("--smoke", action="store_true", help="tiny shapes on the CPU")
    add("--eager", action="store_true", help="no CUDA graphs and no compiling: starts sooner, decodes slower")
    add("--only-rates", default="", help="open-loop rates in requests a second, as 0.9 or 0.6,0.9")
    add("--duration-s", type=float, default=0, help="seconds of an open loop's arrivals")
    add("--no-closed", action="store_true", help="leave the closed loop out")
    add(
        "--conditional",
        default="",
        help="overrides that turn conditional disaggregation on: 'frontend.local_prefill=load'",
    )
    add(
        "--tries",
        default="",
        help=f"more transfer rows, ';' between: {', '.join(steps_8b.TRIES)}, or name:KEY=VALUE,...",
    )
    add("--budget-s", type=float, default=560, help="seconds for everything; what does not fit is left out")
    add("--plan", action="store_true", help="print the stages and their expected seconds, and run none")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
