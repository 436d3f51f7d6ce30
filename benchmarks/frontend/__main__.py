"""Our frontend beside its peers, in turns, on the cores of this machine: what a token and a request cost.

    python -m benchmarks.frontend PEERS [--only paced full ...] [--rounds 3] [--router least_loaded]

With `--router kv` our echo engines publish KV events of every prompt and answer, and our frontend routes by them.

PEERS is the folder of `peers.sh`, which is called for what is missing there. In each comparison all servers run, and get the
same load one after the other, round after round; figures are medians over the rounds, and verdicts are on ratios of these.
CPU time is that of whole processes, their threads and what the kernel does for them included.

    paced     256 streams of 100 tokens, 20 ms apart: CPU per token of the frontend, against Dynamo and smg
    full      256 streams of 100 tokens and of 1000, as fast as it goes: tokens/s, against Dynamo
    first     one stream at a time: time to the first token, nothing else running
    requests  2000-token prompts, all different, one token each: requests/s, against Dynamo
    scaling   two frontend processes on one port against one, each held to one core: requests/s
    path      128 streams over real vLLM on the CPU: CPU per token of frontend and worker, against vLLM's own server
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.frontend.load import Load, Seen
from benchmarks.frontend.targets import Target, baton, dynamo, smg, vllm
from launch.tiny_model import make_tiny_model

PACE_S = 0.02
DYNAMO_PACE = 0.5  # its mocker takes about 10 ms for a step at a speed-up of 1
UNPACED = 1000.0
# With --router kv: blocks of 32 tokens, so that some prompts of a long run are found again and many have to go.
KV_BLOCKS = 20_000
PATH_STREAMS = 128  # at once, so that a step has many tokens and what a server does without any hardly counts
KV_BYTES = 512 << 20
# What the recipe tiny_agg gives to vLLM, and the sizes of `path`, as flags.
VLLM_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--block-size", "32"),
    *("--kv-cache-memory-bytes", str(KV_BYTES), "--max-num-seqs", str(PATH_STREAMS), "--no-enable-log-requests"),
)


@dataclass(frozen=True, slots=True)
class Context:
    """What every comparison needs."""

    folder: Path
    peers: Path
    rounds: int
    overrides: tuple[str, ...]


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--router", default="least_loaded")
    given = parser.parse_args()
    subprocess.run([Path(__file__).with_name("peers.sh"), given.peers], check=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_tiny_model(folder / "tiny")
        told = (f"frontend.router={given.router}", *(f"engine.echo_cache_blocks={KV_BLOCKS}",) * (given.router == "kv"))
        context = Context(folder, given.peers.absolute(), given.rounds, told)
        for name in given.only:
            print(f"\n{name}: {(COMPARISONS[name].__doc__ or '').splitlines()[0]}", flush=True)
            COMPARISONS[name](context)


def paced(context: Context) -> None:
    """256 streams of 100 tokens, 20 ms apart."""
    load = Load(port=0, model="tiny", requests=768)
    with (
        baton(context.folder, *context.overrides, f"engine.echo_interval_s={PACE_S}") as ours,
        dynamo(context.folder, context.peers, DYNAMO_PACE) as theirs,
        smg(context.folder, context.peers, ours) as gateway,
    ):
        seen = in_turns(context, load, [ours, theirs, gateway])
    costs = {name: median(rounds, frontend_us) for name, rounds in seen.items()}
    verdict("CPU per token against Dynamo's", costs["baton"] / costs["dynamo"], at_most=0.5)
    verdict("CPU per token against smg's", costs["baton"] / costs["smg"], at_most=0.6)
    late = {name: median(rounds, first_p99_ms) for name, rounds in seen.items()}
    verdict("first token at 256 streams, p99, against Dynamo's", late["baton"] / late["dynamo"], at_most=1.0)


def full(context: Context) -> None:
    """256 streams, as fast as it goes."""
    with baton(context.folder, *context.overrides) as ours, dynamo(context.folder, context.peers, UNPACED) as theirs:
        for tokens, requests in ((100, 2048), (1000, 768)):
            load = Load(port=0, model="tiny", requests=requests, answer_tokens=tokens)
            seen = in_turns(context, load, [ours, theirs])
            speed = {name: median(rounds, tokens_s) for name, rounds in seen.items()}
            verdict(f"tokens/s of {tokens}-token answers", speed["baton"] / speed["dynamo"], at_least=4.0)


def first(context: Context) -> None:
    """One stream at a time: milliseconds to the first token."""
    load = Load(port=0, model="tiny", streams=1, requests=300, answer_tokens=2)
    with baton(context.folder, *context.overrides) as ours, dynamo(context.folder, context.peers, UNPACED) as theirs:
        seen = in_turns(context, load, [ours, theirs])
    verdict("first token at 1 stream, p50 in ms", median(seen["baton"], first_p50_ms), at_most=1.5)


def requests(context: Context) -> None:
    """2000-token prompts, all different, one token each."""
    load = Load(port=0, model="tiny", streams=32, requests=600, answer_tokens=1, prompt_words=970)
    with baton(context.folder, *context.overrides) as ours, dynamo(context.folder, context.peers, UNPACED) as theirs:
        seen = in_turns(context, load, [ours, theirs])
    speed = {name: median(rounds, requests_s) for name, rounds in seen.items()}
    verdict("requests/s", speed["baton"] / speed["dynamo"], at_least=1.0)


def scaling(context: Context) -> None:
    """Frontend processes on one port, each held to a core of its own."""
    load = Load(port=0, model="tiny", streams=32, requests=600, answer_tokens=1, prompt_words=970)
    cores = sorted(os.sched_getaffinity(0))[:2]
    with (
        baton(context.folder, *context.overrides, name="one") as one,
        baton(context.folder, *context.overrides, "frontend.processes=2", name="two") as two,
    ):
        for target in (one, two):
            for pid, core in zip(target.frontends, cores, strict=False):
                hold(pid, core)
        seen = in_turns(context, load, [replace(one, name="1 process"), replace(two, name="2 processes")])
    speed = {name: median(rounds, requests_s) for name, rounds in seen.items()}
    verdict("requests/s of 2 processes, for each", speed["2 processes"] / speed["1 process"] / 2, at_least=0.85)


def path(context: Context) -> None:
    """128 streams of 100 tokens over real vLLM; the engine cores are left out on both sides."""
    load = Load(port=0, model="tiny", streams=PATH_STREAMS, requests=PATH_STREAMS)
    sizes = (f"engine.args.max_num_seqs={PATH_STREAMS}", f"engine.args.kv_cache_memory_bytes={KV_BYTES}")
    with (
        baton(context.folder, *context.overrides, "engine.backend=vllm", *sizes) as ours,
        vllm(context.folder, VLLM_OPTIONS) as theirs,
    ):
        whole = replace(ours, frontends=ours.frontends + ours.workers, workers=ours.frontends)
        seen = in_turns(context, load, [whole, theirs])
    costs = {name: median(rounds, frontend_us) for name, rounds in seen.items()}
    verdict("CPU per token against vLLM's own server", costs["baton"] / costs["vllm"], at_most=1.0)


COMPARISONS: dict[str, Callable[[Context], None]] = {
    item.__name__: item for item in (paced, full, first, requests, scaling, path)
}


@dataclass(frozen=True, slots=True)
class Round:
    """What was seen of a target in one round."""

    target: Target
    seen: Seen


def in_turns(context: Context, load: Load, targets: Sequence[Target]) -> dict[str, list[Round]]:
    """Play the load on each target in turn, every round with prompts of its own; one short round before does not count."""
    for target in targets:
        play(target, replace(load, requests=load.streams, seed=99))
    found: dict[str, list[Round]] = {target.name: [] for target in targets}
    for number in range(context.rounds):
        for target in targets:
            seen = play(target, replace(load, seed=number))
            found[target.name].append(Round(target, seen))
    for name, rounds in found.items():
        print(
            f"  {name:12} {median(rounds, frontend_us):7.1f} us/token at the frontend, "
            f"{median(rounds, worker_us):6.1f} behind it; "
            f"{median(rounds, tokens_s):8.0f} tokens/s, "
            f"{median(rounds, requests_s):6.0f} requests/s; "
            f"first token {median(rounds, first_p50_ms):6.1f} ms, "
            f"p99 {median(rounds, first_p99_ms):6.1f}; "
            f"between tokens {median(rounds, gap_ms):5.1f} ms; load {median(rounds, own_us):4.1f} us/token",
            flush=True,
        )
    return found


def play(target: Target, load: Load) -> Seen:
    """One load, from a process of its own.

    Raises:
        RuntimeError: More than one request in a hundred failed: what is left would compare different work.
    """
    spec = replace(
        load, port=target.port, key=target.key, watched=tuple(dict.fromkeys(target.frontends + target.workers))
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.frontend.load"],
        input=json.dumps(asdict(spec)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    fields = json.loads(done.stdout)
    seen = Seen(**fields | {"cpu": {int(pid): used for pid, used in fields["cpu"].items()}})
    if seen.failed:
        print(f"  {target.name}: {seen.failed} requests failed: {seen.why}", flush=True)
    if seen.failed * 100 > seen.failed + seen.requests:
        raise RuntimeError(f"{target.name}: {seen.failed} of {seen.failed + seen.requests} failed: {seen.why}")
    return seen


def median(rounds: Sequence[Round], of: Callable[[Round], float]) -> float:
    """The median over rounds of something that was seen."""
    return statistics.median(of(item) for item in rounds)


def frontend_us(item: Round) -> float:
    """CPU microseconds of the frontend for each token."""
    return item.seen.cost_us(*item.target.frontends)


def worker_us(item: Round) -> float:
    """CPU microseconds of what is behind the frontend for each token."""
    return item.seen.cost_us(*item.target.workers)


def tokens_s(item: Round) -> float:
    """Tokens a second."""
    return item.seen.tokens / item.seen.wall


def requests_s(item: Round) -> float:
    """Requests a second."""
    return item.seen.requests / item.seen.wall


def first_p50_ms(item: Round) -> float:
    """Milliseconds to the first token, of the median request."""
    return item.seen.first_ms(0.5)


def first_p99_ms(item: Round) -> float:
    """Milliseconds to the first token, of all but the slowest hundredth."""
    return item.seen.first_ms(0.99)


def gap_ms(item: Round) -> float:
    """Milliseconds between tokens, of the median stream."""
    return statistics.median(item.seen.gap or [0.0]) * 1e3


def own_us(item: Round) -> float:
    """CPU microseconds of the load itself for each token."""
    return item.seen.own_cpu / max(1, item.seen.tokens) * 1e6


def verdict(what: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
    """Say whether a bar is met."""
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    bar = f"at least {at_least}" if at_least is not None else f"at most {at_most}"
    print(f"  -> {what}: {value:.2f} ({bar}): {'met' if met else 'MISSED'}", flush=True)


def hold(pid: int, core: int) -> None:
    """Keep all threads of a process on one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), {core})


if __name__ == "__main__":
    main()
