"""The trace of `benchmarks.routing.trace` through a real frontend: ours, or NVIDIA Dynamo's with its mocker.

    python -m benchmarks.routing.replay baton [--router kv] [--frontends 1]
    python -m benchmarks.routing.replay dynamo --python PATH/OF/ITS/VENV/bin/python

Ours runs eight echo workers with a prefix cache of `quality.BLOCKS` blocks that compute `quality.TOKENS_PER_S` prompt tokens
a second; Dynamo its mocker with eight workers of as many blocks, at its own pace. The mocker answers with other tokens than an
echo, so that the next turn finds the prompt in its cache but not the answer, and there is less to be found. Turns come when they are due (`--speed`
times as fast as the trace says) and their conversation's last answer has come. Printed are the share of prompt tokens that
`usage` says were cached, and for the busiest worker over the mean the requests, and the tokens computed and answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.routing import quality
from benchmarks.routing.trace import Turn, conversations
from launch.tiny_model import make_tiny_model

EXTRA = {"nvext": {"extra_fields": ["worker_id"]}}


@dataclass(slots=True)
class Tally:
    """What the answers said."""

    asked: int = 0
    cached: int = 0
    failed: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


async def play(url: str, key: str, talks: list[list[Turn]], speed: float, extra: dict[str, Any]) -> Tally:
    """Play the trace."""
    tally = Tally()
    begun = time.monotonic()
    headers = {"Authorization": f"Bearer {key}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session, asyncio.TaskGroup() as group:

        async def talk(turns: Sequence[Turn]) -> None:
            await asyncio.sleep(max(0.0, begun + turns[0].start_s / speed - time.monotonic()))
            for turn in turns:
                if turn.number:
                    await asyncio.sleep(turn.think_s / speed)
                await ask(turn)

        async def ask(turn: Turn) -> None:
            body = {"model": "tiny", "prompt": turn.prompt, "max_tokens": turn.answer, "ignore_eos": True, **extra}
            sent = time.monotonic()
            async with session.post(f"{url}/completions", json=body) as response:
                said = await response.json()
            if response.status != 200:
                tally.failed += 1
                return
            usage = said["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            tally.asked += len(turn.prompt)
            tally.cached += cached
            tally.seconds.append(time.monotonic() - sent)
            worker = (said.get("nvext") or {}).get("worker_id")
            if worker is not None:
                name = json.dumps(worker, sort_keys=True)
                tally.requests[name] += 1
                tally.tokens[name] += len(turn.prompt) - cached + turn.answer

        for turns in talks:
            if turns:
                group.create_task(talk(turns))
    return tally


@contextlib.contextmanager
def baton(folder: Path, router: str, frontends: int) -> Iterator[tuple[list[str], str]]:
    """Eight echo workers behind our frontends; yields their URLs and the key."""
    overrides = (
        "+recipe=tiny_agg",
        "engine.backend=echo",
        f"engine.echo_cache_blocks={quality.BLOCKS}",
        f"engine.echo_prefill_tokens_per_s={quality.TOKENS_PER_S}",
        f"engine.echo_interval_s={quality.TOKEN_S}",
        f"roles.aggregated.replicas={quality.WORKERS}",
        f"frontend.router={router}",
        f"frontend.processes={frontends}",
        "security.open_metrics=true",
        f"cluster.cpu_engines_per_node={quality.WORKERS}",
        f"model.path=tiny:{folder / 'tiny'}",
        "model.name=tiny",
    )
    with launched(folder, overrides) as run:
        endpoint = json.loads((run / "endpoint.json").read_text())
        yield endpoint["urls"], (run / "api_key").read_text().strip()


@contextlib.contextmanager
def launched(folder: Path, overrides: Sequence[str]) -> Iterator[Path]:
    """A deployment that serves; yields its run directory."""
    here = ("name=replay", f"runs_dir={folder / 'runs'}", "wait=ready")
    subprocess.run([sys.executable, "-m", "launch", *overrides, *here], check=True, stdout=sys.stderr)
    try:
        yield folder / "runs" / "replay"
    finally:
        subprocess.run(
            [sys.executable, "-m", "launch.stop", "replay", "--runs-dir", str(folder / "runs")],
            check=False,
            stdout=sys.stderr,
        )


@contextlib.contextmanager
def dynamo(folder: Path, python: str, mode: str, more: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Dynamo's frontend and eight of its mockers; yields the URL and any key."""
    port = _free_port()
    env = os.environ | {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "kv"),
        "DYN_LOG": "warn",
        "HF_HUB_OFFLINE": "1",
    }
    planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
    model = str(folder / "tiny")
    size = ["--block-size", str(quality.BLOCK), "--num-gpu-blocks-override", str(quality.BLOCKS)]
    mocker = ["dynamo.mocker", "--model-path", model, "--model-name", "tiny", "--num-workers", str(quality.WORKERS)]
    front = ["dynamo.frontend", "--http-port", str(port), "--router-mode", mode]
    front += ["--kv-cache-block-size", str(quality.BLOCK)] if mode == "kv" else []
    front += [f"--{option}" for option in more]
    with (folder / "dynamo.log").open("w") as log:
        running = [
            subprocess.Popen([python, "-m", *argv, *planes], env=env, stdout=log, stderr=log)
            for argv in ([*mocker, *size], front)
        ]
        try:
            time.sleep(20)
            yield [f"http://127.0.0.1:{port}/v1"], "none"
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def note_workers(tally: Tally, urls: Sequence[str], answer: float) -> None:
    """Take the requests and tokens of each worker from our frontends' pages."""
    for url in urls:
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as response:
            page = response.read().decode()
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == "baton_frontend_kv_requests_total":
                    tally.requests[sample.labels["worker"]] += int(sample.value)
                    tally.tokens[sample.labels["worker"]] += round(sample.value * answer)
                elif sample.name == "baton_frontend_kv_computed_tokens_total":
                    tally.tokens[sample.labels["worker"]] += int(sample.value)


def main() -> None:
    """Play, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=("baton", "dynamo"))
    parser.add_argument("--router", default="kv")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument(
        "--more", nargs="*", default=[], help="more of Dynamo's frontend's options, without their dashes"
    )
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--speed", type=float, default=1.0)
    asked = parser.parse_args()
    talks = conversations(asked.seed, asked.rate)
    turns = [turn for each in talks for turn in each]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_model(folder / "tiny")
        serving = (
            baton(folder, asked.router, asked.frontends)
            if asked.system == "baton"
            else dynamo(folder, asked.python, asked.router, asked.more)
        )
        with serving as (urls, key):
            parts = [talks[number :: len(urls)] for number in range(len(urls))]

            async def all_parts() -> list[Tally]:
                extra = EXTRA if asked.system == "dynamo" else {}
                return await asyncio.gather(
                    *(play(url, key, part, asked.speed, extra) for url, part in zip(urls, parts, strict=True))
                )

            tallies = asyncio.run(all_parts())
            whole = Tally()
            for tally in tallies:
                whole.asked += tally.asked
                whole.cached += tally.cached
                whole.failed += tally.failed
                whole.seconds += tally.seconds
                whole.requests += tally.requests
                whole.tokens += tally.tokens
            if asked.system == "baton":
                note_workers(whole, urls, statistics.mean(turn.answer for turn in turns))
    spread = {
        name: max(counts.values()) / (sum(counts.values()) / quality.WORKERS)
        for name, counts in (("requests", whole.requests), ("work", whole.tokens))
        if counts
    }
    print(
        f"{asked.system} {asked.router}, {len(urls)} frontends: {len(turns)} requests, {whole.failed} failed, "
        f"found in cache {whole.cached / max(whole.asked, 1):.3f}, "
        f"busiest / mean {', '.join(f'{name} {value:.2f}' for name, value in spread.items()) or 'unknown'} "
        f"({len(whole.requests)} workers), "
        f"whole answer p50 {1000 * statistics.median(whole.seconds):.0f} ms; "
        f"no eviction would be {quality.no_eviction(talks, answers=asked.system == 'baton'):.3f}"
    )


if __name__ == "__main__":
    main()
