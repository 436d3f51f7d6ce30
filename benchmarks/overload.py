"""Ten times the load that the workers sustain, for a minute: what is still answered, what is refused, and what is left.

    python -m benchmarks.overload [--seconds 60] [--factor 10]

One echo engine that runs 32 requests of 50 tokens at once, 20 ms a token, sustains 32 requests a second. First that load is
offered (open loop, Poisson) for the best goodput there is; then the factor of it; then again the sustainable load, to see how
soon it is served as before. Goodput counts the requests whose whole answer came within `GOOD_S`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks.gpu.load import quantile
from tests.deployments import deployed

SLOTS, TOKENS, INTERVAL_S = 32, 50, 0.02
SUSTAINED = SLOTS / (TOKENS * INTERVAL_S)
GOOD_S = 5.0
GIVE_UP_S = 60.0
OVERRIDES = (
    *("+recipe=tiny_agg", "engine.backend=echo", f"engine.echo_interval_s={INTERVAL_S}", f"engine.echo_slots={SLOTS}"),
    *(f"frontend.busy_requests={SLOTS}", "frontend.queue_requests=64"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request; times in seconds from the start of its phase."""

    sent: float
    took: float
    status: int
    whole: bool


async def ask(host: str, port: int, key: str, start: float) -> Outcome:
    """One chat, on a connection of its own, as of a client that has just come."""
    body = b'{"model":"tiny","messages":[{"role":"user","content":"one two three four"}],"max_tokens":%d}' % TOKENS
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    sent = time.perf_counter()
    got = b""
    try:
        async with asyncio.timeout(GIVE_UP_S):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            got = await reader.read()
            writer.close()
    except (OSError, TimeoutError):
        pass
    status = int(got[9:12]) if got.startswith(b"HTTP/1.1 ") else 0
    whole = b'"completion_tokens":%d' % TOKENS in got
    return Outcome(sent - start, time.perf_counter() - sent, status, whole)


async def offer(host: str, port: int, key: str, rate: float, seconds: float, seed: int) -> list[Outcome]:
    """Requests at random moments, `rate` a second; returns when the last is answered."""
    rng, start = random.Random(seed), time.perf_counter()
    tasks: list[asyncio.Task[Outcome]] = []
    due = 0.0
    while (due := due + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(host, port, key, start)))
    return list(await asyncio.gather(*tasks))


def good(outcomes: list[Outcome]) -> int:
    """Requests with their whole answer in time."""
    return sum(item.whole and item.took <= GOOD_S for item in outcomes)


def resident_mb(pid: int) -> float:
    """Memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def main() -> None:
    """The three phases, and a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=10.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with deployed(folder, *OVERRIDES, f"model.path=tiny:{folder / 'tiny'}", name="overload") as running:
            host, _, port = running.endpoint.url.removeprefix("http://").removesuffix("/v1").partition(":")
            pid, key = running.pids()["frontend-0"], running.run.api_key()
            phases = (("sustainable", 1.0, 20.0), ("overload", given.factor, given.seconds), ("after", 1.0, 20.0))
            found: dict[str, list[Outcome]] = {}
            memory = [resident_mb(pid)]
            for number, (name, factor, seconds) in enumerate(phases):
                rate = SUSTAINED * factor
                found[name] = uvloop.run(offer(host, int(port), key, rate, seconds, number))
                memory.append(resident_mb(pid))
                tell(name, rate, seconds, found[name], memory[-1])
    best = good(found["sustainable"]) / 20.0
    kept = good(found["overload"]) / given.seconds
    refused = [item.took for item in found["overload"] if item.status == 503]
    late = [item.sent for item in found["after"] if not (item.whole and item.took <= GOOD_S)]
    verdict("goodput against the best", kept / best, kept >= 0.9 * best)
    verdict("refusals within 100 ms", share := sum(took <= 0.1 for took in refused) / len(refused), share >= 0.99)
    others = [item for item in found["overload"] if item.status not in (200, 503)]
    verdict("neither answered nor refused", len(others), not others)
    verdict("memory grown, in MB", memory[2] - memory[1], memory[2] - memory[1] < 50)
    verdict("seconds until served as before", recovered := max(late, default=0.0), recovered <= 5.0)


def tell(name: str, rate: float, seconds: float, outcomes: list[Outcome], memory_mb: float) -> None:
    """A row of the table."""
    answered = [item.took for item in outcomes if item.status == 200] or [0.0]
    refused = [item.took for item in outcomes if item.status == 503] or [0.0]
    print(
        f"| {name} | {rate:.0f}/s for {seconds:.0f} s | {len(outcomes)} | {good(outcomes) / seconds:.1f}/s | "
        f"{quantile(answered, 0.5):.2f} / {quantile(answered, 0.99):.2f} s | "
        f"{sum(item.status == 503 for item in outcomes)} | "
        f"{quantile(refused, 0.5) * 1e3:.0f} / {quantile(refused, 0.99) * 1e3:.0f} ms | {memory_mb:.0f} MB |",
        flush=True,
    )


def verdict(what: str, value: float, met: bool) -> None:
    """Say whether a bar is met."""
    print(f"{what}: {value:.3g}: {'met' if met else 'MISSED'}", flush=True)


if __name__ == "__main__":
    main()
