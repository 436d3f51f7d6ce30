"""The load: which prompts arrive when, a client that plays them, and what it saw in figures.

    python -m benchmarks.gpu.load < spec.json > seen.json

runs in a process of its own, so that nothing else of the benchmark delays a time stamp. It plays a workload against Baton's
frontend (HTTP and server-sent events) or against plain engines (`benchmarks.gpu.bare_engine`: one JSON object a line), in
which case it drives both legs itself. Prompts and arrival times depend on the workload alone: every target gets the same.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What arrives: an open loop of `rate` requests a second (Poisson, for `duration_s`), or, with a rate of 0, a closed
    loop that keeps `at_once` requests running until `count` are done."""

    name: str
    prompt_tokens: int
    answer_tokens: int
    vocabulary: int
    rate: float = 0.0
    duration_s: float = 45.0
    at_once: int = 32
    count: int = 64
    timeout_s: float = 150.0


@dataclass(slots=True, kw_only=True)
class Seen:
    """What the client saw of one request; times in seconds from the start of the load, gaps between tokens."""

    at: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    gap: float = 0.0
    error: str = ""

    def came(self, now: float, tokens: int) -> None:
        """Some tokens arrived."""
        if self.tokens:
            self.gap = max(self.gap, now - self.last)
        else:
            self.first = now
        self.last = now
        self.tokens += tokens


def arrivals(work: Workload) -> list[float]:
    """Seconds after the start at which requests arrive; all 0 in a closed loop."""
    if not work.rate:
        return [0.0] * work.count
    rng, now = random.Random(f"arrivals {work.rate}"), 0.0
    found: list[float] = []
    while True:
        now += rng.expovariate(work.rate)
        if now > work.duration_s:
            return found or [0.0]
        found.append(now)


def prompts(work: Workload, count: int) -> list[list[int]]:
    """Prompts of random tokens, all different; the last two ids of the vocabulary are special and left out."""
    rng = random.Random(f"prompts {work.name} {work.rate}")
    return [[rng.randrange(work.vocabulary - 2) for _ in range(work.prompt_tokens)] for _ in range(count)]


def figures(work: Workload, seen: list[Seen], gpus: int) -> dict[str, Any]:
    """The row of a workload. Throughput is over the time from the first request to the last token."""
    good = [item for item in seen if not item.error and item.tokens == work.answer_tokens]
    if not good:
        return {"requests": len(seen), "failed": len(seen)}
    ttft = [item.first - item.at for item in good]
    itl = [(item.last - item.first) / (item.tokens - 1) for item in good if item.tokens > 1] or [0.0]
    wall = max(item.last for item in good) - min(item.at for item in seen)
    return {
        "requests": len(seen),
        "failed": len(seen) - len(good),
        "tok_s_gpu": round(sum(item.tokens for item in good) / wall / gpus, 2),
        "ttft_p50_s": round(quantile(ttft, 0.5), 4),
        "ttft_p99_s": round(quantile(ttft, 0.99), 4),
        "itl_p50_ms": round(quantile(itl, 0.5) * 1e3, 3),
        "itl_p99_ms": round(quantile(itl, 0.99) * 1e3, 3),
        "gap_ms": round(max(item.gap for item in good) * 1e3, 1),
        "latency_mean_s": round(statistics.fmean(item.last - item.at for item in good), 4),
        "wall_s": round(wall, 2),
    }


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


class Lines(asyncio.Protocol):
    """One connection, read in lines, each with the time at which it came.

    `on_rest` looks at what is not a whole line yet: a JSON body ends without a line's end.
    """

    def __init__(self, on_line: Callable[[bytes, float], bool], on_rest: Callable[[bytes], bool] | None = None) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_line = on_line
        self._on_rest = on_rest
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        """Give whole lines on, until one of them ends the answer."""
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self.done.done() and self._on_line(line, now):
                self.done.set_result(None)
        if self._rest and self._on_rest and not self.done.done() and self._on_rest(self._rest):
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """The other side closed; that is an error unless the answer had ended."""
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"closed before the end: {error or self._rest[:200]!r}"))


async def exchange(
    host: str,
    port: int,
    payload: bytes,
    on_line: Callable[[bytes, float], bool],
    on_rest: Callable[[bytes], bool] | None = None,
) -> None:
    """Send a request on a connection of its own and read lines until `on_line` says that it was the last."""
    transport, lines = await asyncio.get_running_loop().create_connection(lambda: Lines(on_line, on_rest), host, port)
    try:
        transport.write(payload)
        await lines.done
    finally:
        transport.close()


class Baton:
    """The frontend of a deployment, as a client of OpenAI's API sees it."""

    def __init__(self, url: str, key: str, model: str = "m") -> None:
        self._model = model
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self._host, self._port = parts.hostname, parts.port
        self._head = (
            f"POST {parts.path}/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {key}\r\n"
            "Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )

    def prepare(self, prompt: list[int], answer_tokens: int) -> bytes:
        """The request's bytes, made before the clock runs."""
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": answer_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        return (self._head % len(body)).encode() + body

    async def play(self, prepared: bytes, seen: Seen, start: float) -> None:
        """One request; events are counted as they come, and the usage at the end says how many tokens they were."""
        usage, status = 0, b""

        def on_line(line: bytes, now: float) -> bool:
            nonlocal usage, status
            if not status:
                status = line
            elif line.startswith(b"data: {"):
                if line.startswith(b'data: {"error"'):
                    seen.error = line.decode(errors="replace")[:300]
                elif b'"choices":[]' not in line:
                    seen.came(now - start, 1)
                if b'"usage":{' in line:
                    usage = json.loads(line[6:])["usage"]["completion_tokens"]
            return line.startswith(b"data: [DONE]")

        def refused(rest: bytes) -> bool:
            if b" 200 " in status or not rest.startswith(b"{"):
                return False
            try:
                json.loads(rest)
            except ValueError:
                return False
            seen.error = rest.decode(errors="replace")[:300]
            return True

        await exchange(self._host, self._port, prepared, on_line, refused)
        if b" 200 " not in status:
            seen.error = seen.error or status.decode(errors="replace")
        elif usage:
            seen.tokens = usage  # events may carry several tokens


class Bare:
    """Plain engines: prefill here, then decode there; or one leg, in turns."""

    def __init__(self, prefill: list[int], answering: list[int]) -> None:
        self._prefill = itertools.cycle(prefill) if prefill else None
        self._answering = itertools.cycle(answering)

    def prepare(self, prompt: list[int], answer_tokens: int) -> tuple[bytes, int]:
        """The prompt as JSON, made before the clock runs."""
        return json.dumps(prompt).encode(), answer_tokens

    async def play(self, prepared: tuple[bytes, int], seen: Seen, start: float) -> None:
        """One request, over its legs."""
        prompt, answer_tokens = prepared
        transfer = None
        if self._prefill:
            transfer = await self._leg(next(self._prefill), prompt, 1, PREFILL, lambda now, tokens: None)
        await self._leg(
            next(self._answering), prompt, answer_tokens, transfer, lambda now, tokens: seen.came(now - start, tokens)
        )

    async def _leg(
        self, port: int, prompt: bytes, tokens: int, transfer: Any, came: Callable[[float, int], None]
    ) -> Any:
        last: dict[str, Any] = {}

        def on_line(line: bytes, now: float) -> bool:
            message = json.loads(line)
            if message.get("n"):
                came(now, message["n"])
            if message.get("done"):
                last.update(message)
            return bool(message.get("done"))

        sampling = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        rest = json.dumps({"sampling": sampling, "transfer": transfer}).encode()
        await exchange("127.0.0.1", port, b'{"op":"generate","prompt":' + prompt + b"," + rest[1:] + b"\n", on_line)
        if last.get("error"):
            raise ConnectionError(last["error"])
        return last.get("transfer")


async def play(work: Workload, target: Baton | Bare) -> list[Seen]:
    """Play the workload and return what was seen, in the order of arrival."""
    times = arrivals(work)
    prepared: list[Any] = [target.prepare(prompt, work.answer_tokens) for prompt in prompts(work, len(times))]
    start = time.perf_counter()
    seen: list[Seen] = []

    async def one(item: Any, at: float) -> None:
        record = Seen(at=at)
        seen.append(record)
        try:
            async with asyncio.timeout(work.timeout_s):
                await target.play(item, record, start)
        except (OSError, TimeoutError, ValueError) as error:
            record.error = f"{type(error).__name__}: {error}"[:300]

    async def in_turn(items: Iterator[Any]) -> None:
        for item in items:
            await one(item, time.perf_counter() - start)

    async with asyncio.TaskGroup() as group:
        if not work.rate:
            rest = iter(prepared)
            for _ in range(work.at_once):
                group.create_task(in_turn(rest))
        for item, at in zip(prepared, times, strict=True) if work.rate else ():
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - start)))
            group.create_task(one(item, time.perf_counter() - start))
    return seen


def main() -> None:
    """Play the workload of the specification on standard input; print what was seen."""
    spec = json.load(sys.stdin)
    work, target = Workload(**spec["workload"]), spec["target"]

    async def run() -> list[Seen]:
        return await play(work, Baton(**target) if "url" in target else Bare(**target))

    print(json.dumps([asdict(item) for item in asyncio.run(run())]))


if __name__ == "__main__":
    main()
