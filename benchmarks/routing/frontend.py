"""What mode kv costs a frontend, all of it: CPU time of the process, beside mode least_loaded, in turns.

    python -m benchmarks.routing.frontend [--rounds 5]

Two deployments of four echo workers each, one frontend each; the workers of the first have caches and tell of them. Each round
asks the same of both: `REQUESTS` completions of prompts of 2,000 token ids for one token (what a request costs; half of each
prompt was asked before), and `STREAMS` streams of 100 tokens (what a token costs, their requests taken off). CPU is that of the
frontend process and all its threads, from /proc, less what it uses when nobody asks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from benchmarks.routing.replay import launched
from launch.records import RunDirectory
from launch.tiny_model import make_tiny_model

REQUESTS, STREAMS, TOKENS, PROMPT, AT_ONCE = 400, 100, 100, 2000, 16
IDLE_S = 3.0
MODES = ("kv", "least_loaded")


@dataclass(slots=True)
class Side:
    """One deployment."""

    url: str
    key: str
    pid: int
    idle: float = 0.0
    """CPU seconds a second without requests."""
    request_us: list[float] = field(default_factory=list)
    token_us: list[float] = field(default_factory=list)

    def cpu_s(self) -> float:
        """CPU time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def spent(self, prompts: list[list[int]], tokens: int, stream: bool) -> float:
        """CPU seconds that it takes to answer, beyond idling."""
        gate = asyncio.Semaphore(AT_ONCE)
        headers = {"Authorization": f"Bearer {self.key}"}
        begun, before = time.monotonic(), self.cpu_s()
        async with aiohttp.ClientSession(headers=headers) as session:

            async def ask(prompt: list[int]) -> None:
                body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "stream": stream, "ignore_eos": True}
                async with gate, session.post(f"{self.url}/completions", json=body) as response:
                    await response.read()
                    assert response.status == 200, await response.text()

            await asyncio.gather(*map(ask, prompts))
        return self.cpu_s() - before - self.idle * (time.monotonic() - begun)


def prompts(rng: random.Random, count: int, length: int) -> list[list[int]]:
    """Prompts of which each second one goes on from the first half of the one before."""
    found: list[list[int]] = []
    for number in range(count):
        begin = found[-1][: length // 2] if number % 2 else []
        found.append(begin + [rng.randrange(100, 1900) for _ in range(length - len(begin))])
    return found


async def measure(sides: dict[str, Side], rounds: int) -> None:
    """Fill in what things cost."""
    rng = random.Random(0)
    for side in sides.values():
        await side.spent(prompts(rng, 50, PROMPT), 1, False)
        before = side.cpu_s()
        await asyncio.sleep(IDLE_S)
        side.idle = (side.cpu_s() - before) / IDLE_S
    for number in range(rounds):
        asked, streamed = prompts(rng, REQUESTS, PROMPT), prompts(rng, STREAMS, 64)
        for side in list(sides.values())[:: 1 if number % 2 else -1]:
            side.request_us.append(await side.spent(asked, 1, False) / REQUESTS * 1e6)
            short = await side.spent(streamed, 1, True)
            side.token_us.append((await side.spent(streamed, TOKENS, True) - short) / STREAMS / (TOKENS - 1) * 1e6)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        make_tiny_model(Path(name) / "tiny")
        common = (
            *(
                "+recipe=tiny_agg",
                "engine.backend=echo",
                "roles.aggregated.replicas=4",
                "cluster.cpu_engines_per_node=4",
            ),
            *(f"model.path=tiny:{Path(name) / 'tiny'}", "model.name=tiny", "engine.echo_interval_s=0.01"),
        )
        kv = ("frontend.router=kv", "engine.echo_cache_blocks=4000")
        with (
            launched(Path(name) / "kv", (*common, *kv)) as first,
            launched(Path(name) / "plain", (*common, "frontend.router=least_loaded")) as second,
        ):
            sides = {mode: _side(run) for mode, run in zip(MODES, (first, second), strict=True)}
            asyncio.run(measure(sides, rounds))
    print("| frontend.router | CPU of a request, µs | of a streamed token, µs | idle, ms a second |")
    print("|---|---|---|---|")
    for mode, side in sides.items():
        request, token = statistics.median(side.request_us), statistics.median(side.token_us)
        print(f"| {mode} | {request:.0f} | {token:.1f} | {side.idle * 1e3:.0f} |")


def _side(run: Path) -> Side:
    record = RunDirectory(run)
    job = record.job()
    assert job
    pids = {name: member.pid for rank in record.ranks(job.attempt).values() for name, member in rank.members.items()}
    url = json.loads((run / "endpoint.json").read_text())["url"]
    return Side(url, record.api_key(), pids["frontend-0"])


if __name__ == "__main__":
    main()
