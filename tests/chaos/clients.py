"""Clients: each sends requests one after the other, and says of every one how it ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp

from tests.chaos.asks import Ask, Behaviour, Supply

# Without any byte of the answer: how long a slow reader takes over what he has is his own affair.
DEADLINE_S = 40.0
SLOW_S = 0.05
TRIES = 5
AGAIN_S = 0.2
# A client whose frontend dies sees it a little before or after the fault is noted.
SLACK_S = 1.0


class End(StrEnum):
    """How a request ended. `broken` is only allowed where the request's own frontend was killed."""

    RIGHT = "right"
    LEFT = "left"
    BROKEN = "broken"
    WRONG = "wrong"
    LOST = "lost"
    STUCK = "stuck"


@dataclass(slots=True)
class Tally:
    """How all requests ended; `problems` are those that must not be."""

    ends: Counter[End] = field(default_factory=Counter)
    retried: int = 0
    problems: list[str] = field(default_factory=list)
    longest_gap_s: float = 0.0


class Clients:
    """Many clients against several frontends; `was_down(url, since)` says whether one was down at any time since then."""

    def __init__(self, asks: Supply, urls: Sequence[str], key: str, was_down: Callable[[str, float], bool]) -> None:
        self.tally = Tally()
        self._asks = asks
        self._urls = urls
        self._headers = {"Authorization": f"Bearer {key}"}
        self._was_down = was_down

    async def run(self, count: int, stop: asyncio.Event) -> None:
        """Ask until `stop` is set; every request that was begun is brought to its end."""
        # A connection for each request: one that its server closed meanwhile would look like a lost request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, headers=self._headers) as session:

            async def client() -> None:
                while not stop.is_set():
                    await self._settle(session, self._asks.next())

            async with asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(client())

    async def _settle(self, session: aiohttp.ClientSession, ask: Ask) -> None:
        """Ask until there is an answer: what a killed frontend was answering is asked again, elsewhere."""
        for attempt in range(TRIES):
            url, begun = self._urls[(ask.number + attempt) % len(self._urls)], time.monotonic()
            end, why = await self._ask(session, url, ask)
            if end is End.LOST and why.startswith("connection") and self._was_down(url, begun - SLACK_S):
                end = End.BROKEN
            self.tally.ends[end] += 1
            if end in (End.WRONG, End.LOST, End.STUCK):
                moment = time.strftime("%H:%M:%S")
                self.tally.problems.append(f"{moment} request {ask.number} at {url} is {end}: {why}")
            if end is not End.BROKEN:
                return
            self.tally.retried += 1
            await asyncio.sleep(AGAIN_S)
        self.tally.problems.append(f"request {ask.number} was broken {TRIES} times")

    async def _ask(self, session: aiohttp.ClientSession, url: str, ask: Ask) -> tuple[End, str]:
        leaves = ask.behaviour is Behaviour.LEAVES
        begun = time.monotonic()
        try:
            async with asyncio.timeout(ask.patience_s if leaves else DEADLINE_S) as limit:
                async with session.post(f"{url}{ask.path}", json=ask.body) as response:
                    if response.status != 200:
                        return End.LOST, f"status {response.status}: {(await response.text())[:300]}"
                    if ask.streams:
                        return await self._stream(response, ask, None if leaves else limit)
                    return _verdict(ask, *_whole(await response.json()))
        except TimeoutError:
            return (End.LEFT, "") if leaves else (End.STUCK, f"no end after {time.monotonic() - begun:.0f} s")
        except (aiohttp.ClientError, OSError) as error:
            return End.LOST, f"connection: {type(error).__name__}: {error}"

    async def _stream(
        self, response: aiohttp.ClientResponse, ask: Ask, limit: asyncio.Timeout | None
    ) -> tuple[End, str]:
        texts = [""] * len(ask.answers)
        usage: dict[str, Any] | None = None
        last = time.monotonic()
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            now = time.monotonic()
            self.tally.longest_gap_s = max(self.tally.longest_gap_s, now - last)
            if ask.behaviour is Behaviour.READS_SLOWLY:
                await asyncio.sleep(SLOW_S)
            last = time.monotonic()
            if limit is not None:
                limit.reschedule(asyncio.get_running_loop().time() + DEADLINE_S)
            if line.startswith(b"data: [DONE]"):
                return _verdict(ask, texts, usage)
            event = json.loads(line[6:])
            if "error" in event:
                return End.LOST, f"error event: {event['error']['message']}"
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
        return End.LOST, "connection: the stream ended without [DONE]"


def _whole(answer: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    texts = [choice.get("text") or choice.get("message", {}).get("content") or "" for choice in answer["choices"]]
    return texts, answer["usage"]


def _verdict(ask: Ask, texts: Sequence[str], usage: dict[str, Any] | None) -> tuple[End, str]:
    """Right is the whole text of every choice, and usage to the token."""
    expected = {"prompt_tokens": ask.prompt_tokens, "completion_tokens": ask.body["max_tokens"] * len(ask.answers)}
    counted = {name: (usage or {}).get(name) for name in expected}
    if tuple(texts) != ask.answers:
        return End.WRONG, f"expected {ask.answers!r}, got {texts!r}"
    if counted != expected:
        return End.WRONG, f"usage is {counted}, expected {expected}"
    return End.RIGHT, ""
