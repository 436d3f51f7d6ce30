"""A load of many streams on one server, with as little work for each chunk as possible: the server is to saturate, not this.

    python -m benchmarks.frontend.load < load.json > seen.json

runs in a process of its own. Tokens are counted by the server's own `usage`, so that servers which send one event for
several tokens, or one more for the role, are compared by the same measure; requests without it count as failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import uvloop

from benchmarks.gpu.load import quantile

WORDS = (
    *("import", "os", "sys", "def", "return", "class", "self", "print", "for", "in", "range", "if", "else", "while"),
    *("try", "except", "with", "as", "from", "lambda", "yield"),
)
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`requests` chats of `prompt_words` random words, `streams` at once, each answered with `answer_tokens`.

    The CPU time of `watched` processes is read before and after.
    """

    port: int
    model: str
    key: str = ""
    streams: int = 256
    requests: int = 1024
    prompt_words: int = 100
    answer_tokens: int = 100
    watched: tuple[int, ...] = ()
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class Seen:
    """What the load saw; times in seconds, `cpu` in seconds by process, `own_cpu` that of the load itself."""

    wall: float = 0.0
    requests: int = 0
    failed: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    cpu: dict[int, float] = field(default_factory=dict)
    own_cpu: float = 0.0
    why: str = ""

    def first_ms(self, share: float) -> float:
        """A quantile of the time to the first token, in milliseconds."""
        return quantile(self.first, share) * 1e3 if self.first else float("nan")

    def cost_us(self, *pids: int) -> float:
        """CPU microseconds of these processes for each token."""
        return sum(self.cpu[pid] for pid in pids) / max(1, self.tokens) * 1e6


def prompts(load: Load) -> list[str]:
    """As many different prompts as requests; they depend on the load alone."""
    rng = random.Random(f"prompts {load.seed} {load.prompt_words}")
    return [" ".join(rng.choice(WORDS) for _ in range(load.prompt_words)) for _ in range(load.requests)]


def bodies(load: Load) -> list[bytes]:
    """The requests, head and body, made before the clock runs."""
    found = []
    for prompt in prompts(load):
        ask = {
            "model": load.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": load.answer_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(ask).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{load.port}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {load.key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        found.append(head.encode() + body)
    return found


class Stream(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self.first = self.last = 0.0
        self._head = b""
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]  # a stream protocol gets a Transport

    async def ask(self, request: bytes) -> int:
        """Send a request and read its answer to the end; returns the tokens that the server counted.

        Raises:
            ValueError: The answer is no success.
        """
        assert self._transport
        self._head = self._tail = b""
        self.first = self.last = 0.0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        counted = USAGE.search(self._tail)
        if not self._head.startswith(b"HTTP/1.1 200") or counted is None:
            raise ValueError((self._head + self._tail)[:300].decode(errors="replace"))
        return int(counted[1])

    def data_received(self, data: bytes) -> None:
        """Note the first and last event; the end of an answer shows in its last bytes."""
        if not self._head:
            self._head = data[:300]
        if b"data: {" in data:
            self.last = time.perf_counter()
            self.first = self.first or self.last
        self._tail = (self._tail + data)[-1000:]
        if self._ended() and self._done and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio.Protocol."""
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionError(f"the connection was lost: {exc}"))

    def close(self) -> None:
        """asyncio.Protocol."""
        if self._transport:
            self._transport.close()

    def _ended(self) -> bool:
        if self._head.startswith(b"HTTP/1.1 200"):
            return self._tail.endswith(b"0\r\n\r\n") and b"[DONE]" in self._tail
        return self._tail.endswith((b"}", b"}\n", b"0\r\n\r\n"))


def cpu_s(pid: int) -> float:
    """CPU seconds that a process and its threads have used."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def play(load: Load) -> Seen:
    """Play the load and return what was seen."""
    loop = asyncio.get_running_loop()
    waiting: Iterator[bytes] = iter(bodies(load))
    seen = Seen()

    async def connect() -> Stream:
        return (await loop.create_connection(Stream, "127.0.0.1", load.port))[1]

    connections = [await connect() for _ in range(load.streams)]

    async def in_turn(connection: Stream) -> None:
        for request in waiting:
            begun = time.perf_counter()
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    tokens = await connection.ask(request)
            except (OSError, TimeoutError, ValueError) as error:
                seen.failed += 1
                seen.why = f"{type(error).__name__}: {error}"
                connection.close()
                connection = await connect()
                continue
            seen.requests += 1
            seen.tokens += tokens
            if connection.first:
                seen.first.append(connection.first - begun)
                seen.gap.append((connection.last - connection.first) / max(1, tokens - 1))
        connection.close()

    before, begun, own = {pid: cpu_s(pid) for pid in load.watched}, time.perf_counter(), time.process_time()
    await asyncio.gather(*(in_turn(connection) for connection in connections))
    seen.wall, seen.own_cpu = time.perf_counter() - begun, time.process_time() - own
    seen.cpu = {pid: cpu_s(pid) - used for pid, used in before.items()}
    return seen


def main() -> None:
    """Play the load on standard input; print what was seen."""
    given = json.load(sys.stdin)
    load = Load(**given | {"watched": tuple(given["watched"])})
    print(json.dumps(asdict(uvloop.run(play(load)))))


if __name__ == "__main__":
    main()
