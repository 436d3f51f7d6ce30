"""The steps on the 8B shape: equal answers, mixed tensor-parallel sizes, sleep, and how fast the KV cache moves."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.gpu import shapes, weights
from benchmarks.gpu.bare import bare_engines
from benchmarks.gpu.bench import GIB, Bench
from benchmarks.gpu.deployment import Deployment, StepError, TimeUpError, deployed, gpu_mib, metric
from benchmarks.gpu.load import PREFILL
from benchmarks.gpu.shapes import Shape

AGGREGATED = {"aggregated": (1, 1)}
DISAGGREGATED = {"prefill": (1, 1), "decode": (1, 1)}
CTL_S = 120
MOVED_S = 10
WARM_PULLS = 6
BAR_GB_S = 150


# --- one engine: the reference, and sleep ---------------------------------------------------------------------------


def aggregated(bench: Bench, steps: frozenset[str]) -> None:
    """One bfloat16 engine: the reference answers, how far they are from themselves in a batch, and sleep."""
    if "sleep" not in steps:
        with small_deployment(bench, "agg", bench.scale.answers, AGGREGATED, 1) as running:
            reference(bench, running, _dtype(bench))
        return
    awake: dict[str, Any] = (
        {"enable_sleep_mode": True} if bench.gpu else {}
    )  # vLLM refuses it on the CPU, and sleeps all the same
    try:
        with small_deployment(bench, "agg", bench.scale.answers, AGGREGATED, 1, **awake) as running:
            if "tokens" in steps:
                reference(bench, running, _dtype(bench))
            _sleep(bench, running)
    except TimeUpError:
        raise
    except StepError as error:
        bench.failed("sleep", str(error))
        if "tokens" in steps and _dtype(bench) not in bench.references:
            aggregated(bench, steps - {"sleep"})


def reference(bench: Bench, running: Deployment, dtype: str) -> None:
    """Keep the answers of one engine, asked one at a time, and say what they are worth."""
    texts = token_prompts(bench)
    alone = bench.references[dtype] = [_answer(bench, running, prompt) for prompt in texts]
    bench.row("tokens", f"agg {dtype}", prompts=len(texts), ready_s=round(running.ready_s, 1))
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: _answer(bench, running, prompt), texts))
    _compare(bench, "tokens", f"agg {dtype}, 8 at once", together, alone)
    # The control: a comparison is worth something only if answers follow the beginning of a prompt, which a decode
    # engine has from the KV cache alone.
    long = [prompt for prompt in texts if len(prompt) >= 100][:6]
    other = [_answer(bench, running, [*_random(bench, len(prompt) - 8, 99), *prompt[-8:]]) for prompt in long]
    mine = [alone[texts.index(prompt)] for prompt in long]
    _compare(bench, "tokens", f"agg {dtype}, other beginning", other, mine)


def _sleep(bench: Bench, running: Deployment) -> None:
    """Level 1: weights go to the host, the KV cache is dropped; after waking, the answers are the same."""
    prompts = token_prompts(bench)[:8]
    before, mib_before = [_answer(bench, running, prompt) for prompt in prompts], gpu_mib()
    slept = _ctl(bench, running, "sleep", "level=1")
    mib_asleep = gpu_mib()
    woke = _ctl(bench, running, "wake")
    mib_awake = gpu_mib()
    after = [_answer(bench, running, prompt) for prompt in prompts]
    bench.row(
        "sleep",
        "agg level 1",
        before_mib=_or_na(mib_before),
        asleep_mib=_or_na(mib_asleep),
        awake_mib=_or_na(mib_awake),
        sleep_s=slept,
        wake_s=woke,
        equal=sum(mine == theirs for mine, theirs in zip(after, before, strict=True)),
        prompts=len(prompts),
    )


def _ctl(bench: Bench, running: Deployment, *words: str) -> float:
    """`python -m launch.ctl`; the seconds it took.

    Raises:
        StepError: It ended with another code than 0; brings what it said.
    """
    begun = time.monotonic()
    argv = [sys.executable, "-m", "launch.ctl", running.run_dir.name, *words]
    done = subprocess.run(
        argv, capture_output=True, text=True, cwd=bench.work, env=bench.env(), timeout=CTL_S, check=False
    )
    print(f"  {' '.join(words)}: {done.stdout.strip()}", flush=True)
    if done.returncode:
        raise StepError(f"{' '.join(argv[1:])} ended with {done.returncode}\n{done.stdout}\n{done.stderr[-2000:]}")
    return round(time.monotonic() - begun, 2)


# --- two engines: the same answers, and the transfer ----------------------------------------------------------------


def disaggregated(bench: Bench, steps: frozenset[str]) -> None:
    """One prefill and one decode engine in bfloat16, at the block size of our GPU recipes."""
    with small_deployment(bench, "disagg", bench.scale.answers, DISAGGREGATED, 2) as running:
        if "tokens" in steps:
            same_answers(bench, running, "tokens", _dtype(bench))
        if "transfer" in steps:
            _transfer(bench, running, f"disagg block {bench.scale.block}")


def small_blocks(bench: Bench, steps: frozenset[str]) -> None:
    """The transfer at vLLM's own block size, for comparison."""
    block = bench.scale.small_block
    with small_deployment(bench, "disagg-small", bench.scale.answers, DISAGGREGATED, 2, block_size=block) as running:
        _transfer(bench, running, f"disagg block {block}")


def exact_aggregated(bench: Bench, steps: frozenset[str]) -> None:
    """The reference in float32, where nothing but an error makes answers differ; few layers, so that it is cheap."""
    with small_deployment(bench, "agg-f32", bench.scale.exact, AGGREGATED, 1, **exact_arguments(bench)) as running:
        reference(bench, running, "float32")


def exact_disaggregated(bench: Bench, steps: frozenset[str]) -> None:
    """Prefill and decode against the float32 reference."""
    with small_deployment(
        bench, "disagg-f32", bench.scale.exact, DISAGGREGATED, 2, **exact_arguments(bench)
    ) as running:
        same_answers(bench, running, "tokens", "float32")


def mismatch(bench: Bench, steps: frozenset[str]) -> None:
    """Prefill on one GPU, decode on two, against the float32 reference. With two GPUs the prefill shares the first."""
    slots = "0,0,1" if bench.gpus == 2 else "0,1,2"
    _pair(bench, "mismatch", (1, 2), slots)


def both_tensor_parallel(bench: Bench, steps: frozenset[str]) -> None:
    """Prefill and decode on two GPUs each, against the float32 reference. With two GPUs both have the same two."""
    slots = "0,1,0,1" if bench.gpus == 2 else "0,1,2,3"
    _pair(bench, "both", (2, 2), slots)


def _pair(bench: Bench, name: str, tensor_parallel: tuple[int, int], slots: str) -> None:
    """Answers of one prefill and one decode engine of these tensor-parallel sizes on GPUs named by `slots`."""
    prefill, decode = tensor_parallel
    env = {"CUDA_VISIBLE_DEVICES": slots} if bench.gpu else {}
    roles = {"prefill": (1, prefill), "decode": (1, decode)}
    with small_deployment(
        bench, name, bench.scale.exact, roles, prefill + decode, env=env, **exact_arguments(bench)
    ) as running:
        same_answers(bench, running, "mismatch", "float32", f"prefill TP{prefill}, decode TP{decode} float32")


def same_answers(bench: Bench, running: Deployment, step: str, dtype: str, name: str = "", moves: bool = True) -> None:
    """Compare with the reference of that dtype; with `moves`, say how much KV cache the answers moved."""
    answers = [_answer(bench, running, prompt) for prompt in token_prompts(bench)]
    moved = metric(running.page("decode-0"), "vllm:nixl_bytes_transferred_sum") if moves else 0.0
    _compare(
        bench,
        step,
        name or f"disagg {dtype}",
        answers,
        bench.references.get(dtype),
        moved_mb=round(moved / 1e6, 3),
        ready_s=round(running.ready_s, 1),
    )


def _transfer(bench: Bench, running: Deployment, name: str) -> None:
    """Pull prompts one at a time and read what vLLM's counters say of it."""

    def pull(prompt: list[int]) -> None:
        running.post(_body(prompt, 8))

    _measure(bench, name, pull, lambda: running.page("decode-0"))


def _measure(bench: Bench, name: str, pull: Any, page: Any) -> None:
    for number in range(WARM_PULLS):  # the first shakes hands; the next ones are slow too
        pull(_random(bench, bench.scale.transfer_lengths[0], -number))
    for length in bench.scale.transfer_lengths:
        first = page()
        for number in range(bench.scale.transfer_times):
            pull(_random(bench, length, number + 1))
        last = _settled(page, first, bench.scale.transfer_times)
        bytes_, seconds, moves, pieces = (
            metric(last, f"vllm:nixl_{item}") - metric(first, f"vllm:nixl_{item}")
            for item in (
                "bytes_transferred_sum",
                "xfer_time_seconds_sum",
                "xfer_time_seconds_count",
                "num_descriptors_sum",
            )
        )
        rate = bytes_ / seconds / 1e9 if seconds else 0.0
        bench.row(
            "transfer",
            name,
            tokens=length,
            moves=int(moves),
            gb_each=round(bytes_ / max(1, moves) / 1e9, 4),
            descriptors=int(pieces / max(1, moves)),
            ms_each=round(seconds / max(1, moves) * 1e3, 2),
            gb_s=round(rate, 2),
            bar=("met" if rate >= BAR_GB_S else "missed") if bench.gpu and bytes_ / max(1, moves) >= 1e9 else "n/a",
        )


def _settled(page: Any, first: str, moves: int) -> str:
    """The page once the counters have all moves; they arrive with an engine step."""
    name = "vllm:nixl_xfer_time_seconds_count"
    deadline = time.monotonic() + MOVED_S
    while True:
        last = str(page())
        if metric(last, name) - metric(first, name) >= moves or time.monotonic() > deadline:
            return last
        time.sleep(0.1)


# --- settings that may make the transfer faster ---------------------------------------------------------------------

TRIES = {
    "threads1": "extra.num_threads=1",
    "threads16": "extra.num_threads=16",
    "block256": "block_size=256",
    "block512": "block_size=512",
    "layout": "VLLM_KV_CACHE_LAYOUT=BLHNC",
    "ucx-log": "UCX_PROTO_INFO=y",
}


def trial(bench: Bench, text: str) -> None:
    """The transfer with other settings: a name of `TRIES`, or `name:KEY=VALUE,...`.

    A key in capitals is an environment variable, `extra.<key>` goes into the connector's configuration, any other is an
    engine argument. Plain engines, because a recipe does not reach into the connector.
    """
    name, _, settings = text.partition(":")
    env, extra, args = parse_settings(settings or TRIES[name])
    overrides = _overrides(bench, bench.scale.answers, DISAGGREGATED, 2, **args)
    with bare_engines(
        bench.work,
        f"try-{name}",
        overrides,
        bench.env(**env),
        bench.scale.ready_s,
        extra_config=extra,
        log_stats=True,
    ) as (engines, _):
        prefill, decode = engines

        def pull(prompt: list[int]) -> None:
            transfer = prefill.generate(prompt, 1, PREFILL)["transfer"]
            decode.generate(prompt, 8, transfer)

        _measure(bench, f"try {name} (bare)", pull, decode.page)


def parse_settings(text: str) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """Environment, connector configuration and engine arguments of `KEY=VALUE,extra.key=1,argument=2`.

    Raises:
        ValueError: A setting has no `=`.
    """
    env: dict[str, str] = {}
    extra: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for item in text.split(","):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--tries: {item!r} is not KEY=VALUE")
        typed = int(value) if re.fullmatch(r"-?\d+", value) else value
        if key.isupper():
            env[key] = value
        elif key.startswith("extra."):
            extra[key.removeprefix("extra.")] = typed
        else:
            args[key] = typed
    return env, extra, args


# --- what they share ------------------------------------------------------------------------------------------------


def token_prompts(bench: Bench) -> list[list[int]]:
    """Prompts of the scale's lengths, the same in every run."""
    return [_random(bench, length, 7) for length in bench.scale.token_lengths]


def _random(bench: Bench, length: int, seed: int) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(bench.scale.answers.vocabulary - 2) for _ in range(length)]


def _body(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }


def _answer(bench: Bench, running: Deployment, prompt: list[int]) -> list[int]:
    answer = running.post(_body(prompt, bench.scale.answer_tokens))
    return shapes.ids(answer["choices"][0]["text"])


def _compare(
    bench: Bench, step: str, name: str, mine: list[list[int]], theirs: list[list[int]] | None, **more: Any
) -> None:
    """A row of how many answers are equal, of how many the first token is, and how far they go together."""
    if theirs is None:
        raise StepError(f"{name}: there is no reference to compare with, because its engine failed")
    pairs = list(zip(mine, theirs, strict=True))
    bench.row(
        step,
        name,
        prompts=len(pairs),
        equal=sum(one == other for one, other in pairs),
        first_token_equal=sum(one[:1] == other[:1] for one, other in pairs),
        tokens_together=round(sum(_together(one, other) for one, other in pairs) / max(1, len(pairs)), 1),
        of_tokens=bench.scale.answer_tokens,
        **more,
    )


def _together(one: Iterable[int], other: Iterable[int]) -> int:
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def _dtype(bench: Bench) -> str:
    return "bfloat16" if bench.gpu else "float32"


def exact_arguments(bench: Bench) -> dict[str, Any]:
    """Engine arguments of the float32 shape; small enough that three engines fit two GPUs."""
    if not bench.gpu:
        return {}
    return {"dtype": "float32", "kv_cache_memory_bytes": 4 * GIB, "gpu_memory_utilization": 0.3}


def _overrides(
    bench: Bench, shape: Shape, roles: dict[str, tuple[int, int]], slots: int, **args: str | float | bool
) -> list[str]:
    common: dict[str, str | int | float | bool] = {
        "load_format": weights.FORMAT,
        "block_size": bench.scale.block,
        "max_model_len": bench.scale.max_model_len,
    }
    if bench.gpu:
        common |= {"dtype": "bfloat16", "kv_cache_memory_bytes": bench.scale.kv_bytes, "gpu_memory_utilization": 0.45}
    return bench.overrides(shape, roles, slots, **(common | args))


def small_deployment(
    bench: Bench,
    name: str,
    shape: Shape,
    roles: dict[str, tuple[int, int]],
    slots: int,
    env: dict[str, str] | None = None,
    launch: Sequence[str] = (),
    **args: Any,
) -> contextlib.AbstractContextManager[Deployment]:
    """A deployment of small engines: `roles` as in `Bench.overrides`, `launch` more overrides, `args` vLLM's arguments."""
    overrides = [*_overrides(bench, shape, roles, slots, **args), *launch]
    return deployed(bench.work, name, overrides, bench.env(**(env or {})), bench.scale.ready_s)


def _or_na(mib: int | None) -> int | str:
    return "n/a" if mib is None else mib
