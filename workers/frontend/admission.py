"""Admission: whether a request may go to the workers now, waits for its turn, or is refused.

While some worker of every kind has room (`Thresholds`), requests pass at once. Otherwise they wait in a bounded queue that is
fair by key (`fairness.FairQueue`); what does not fit in it, or waits too long, is refused with 503 and `Retry-After`. A key
over its own rate is refused with 429, and told what it has left. The numbers can be changed while it runs. They are of the
whole deployment; of several frontends each one keeps to its part of them (`workers.frontend.fleet`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec

from workers.frontend.errors import ApiError
from workers.frontend.fairness import FairQueue, Rates, Verdict

LOOK_S = 0.02
RETRY_MOST_S = 60
# What each frontend counts by itself, so that it may have a part of it only.
DIVIDED = (
    "busy_prefill_tokens",
    "busy_requests",
    "queue_requests",
    "queue_tokens",
    "requests_per_minute",
    "tokens_per_minute",
)


class Loaded(Protocol):
    """What a threshold looks at in a worker (`links.Link`)."""

    @property
    def kv_usage(self) -> float:
        """Share of its KV blocks in use, as last reported."""
        ...

    @property
    def prefilling(self) -> int:
        """Prompt tokens of this frontend's requests that it has yet to compute."""
        ...

    def in_flight(self, rank: int) -> int:
        """Streams of this frontend that it is serving; of all its ranks for -1."""
        ...


class Thresholds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From where on a worker is busy, how many requests may wait, and what each key may ask for. 0 sets no limit.

    Attributes:
        busy_kv_usage: Share of its KV blocks in use.
        busy_prefill_tokens: Prompt tokens that it has yet to compute.
        busy_requests: Requests that it is serving.
        queue_requests: Requests that may wait in the frontends.
        queue_tokens: Prompt tokens of the requests that may wait.
        queue_timeout_s: Seconds that one may wait.
        requests_per_minute: Of each key.
        tokens_per_minute: Of each key: prompts and answers.
    """

    busy_kv_usage: float = 0.99
    busy_prefill_tokens: int = 0
    busy_requests: int = 0
    queue_requests: int = 512
    queue_tokens: int = 0
    queue_timeout_s: float = 30.0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0

    def __post_init__(self) -> None:
        for name, value in msgspec.structs.asdict(self).items():
            if value < 0:
                raise ValueError(f"{name} is at least 0, got {value}")

    def busy(self, worker: Loaded) -> bool:
        """Whether a worker should get nothing more for now."""
        return bool(
            (self.busy_kv_usage and worker.kv_usage >= self.busy_kv_usage)
            or (self.busy_prefill_tokens and worker.prefilling >= self.busy_prefill_tokens)
            or (self.busy_requests and worker.in_flight(-1) >= self.busy_requests)
        )

    def part(self, number: int, of: int) -> Thresholds:
        """What frontend `number` (from 0) of so many may do, so that all together do what these say; at least one of each."""
        sizes = {name: getattr(self, name) for name in DIVIDED}
        parts = {name: max(1, size // of + (number < size % of)) if size else 0 for name, size in sizes.items()}
        return msgspec.structs.replace(self, **parts)

    def changed(self, values: dict[str, Any]) -> Thresholds:
        """These, with other values for some; numbers may be written as text.

        Raises:
            ApiError: 400, naming what is wrong.
        """
        try:
            return msgspec.convert(msgspec.structs.asdict(self) | values, Thresholds, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            known = ", ".join(Thresholds.__struct_fields__)
            raise ApiError(400, f"{error}; the limits are {known}") from error


class Gate:
    """The queue before the workers.

    Args:
        thresholds: The limits to begin with.
        room: Whether there is a worker of every kind that is not busy by these thresholds.
        on_refused: Told why a request was refused, in a word.
    """

    def __init__(
        self,
        thresholds: Thresholds,
        room: Callable[[Thresholds], bool],
        on_refused: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.whole = thresholds
        """The limits of the deployment."""
        self.thresholds = thresholds
        """This frontend's part of them."""
        self._place = 0, 1
        self._room = room
        self._on_refused = on_refused
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._rates = Rates(thresholds.requests_per_minute, thresholds.tokens_per_minute)
        self._due: asyncio.Handle | None = None
        self._done: deque[float] = deque([time.monotonic()], maxlen=64)
        """When requests ended lately: how fast the queue moves."""

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def change(self, values: dict[str, Any]) -> None:
        """Change limits of the deployment, from now on.

        Raises:
            ApiError: 400, naming what is wrong; nothing was changed.
        """
        before, self.whole = self.whole, self.whole.changed(values)
        now = self.thresholds = self.whole.part(*self._place)
        if _rates(self.whole) != _rates(before):
            self._rates.change(*_rates(now))
        self._look()

    def divide(self, number: int, of: int) -> None:
        """From now on this is frontend `number` of so many, and has that part of the limits."""
        if (number, of) != self._place:
            self._place = number, of
            self.thresholds = self.whole.part(number, of)
            self._rates.resize(*_rates(self.thresholds), time.monotonic())
            self._look()

    @property
    def frontends(self) -> int:
        """How many share the limits."""
        return self._place[1]

    def busy(self, worker: Loaded) -> bool:
        """Whether a worker should get nothing more for now."""
        return self.thresholds.busy(worker)

    def refuse_early(self) -> None:
        """Refuse what would be refused anyhow, before any work is done for it.

        Raises:
            ApiError: 503, the queue is full.
        """
        if self._full(0):
            raise self._refusal("queue_full", f"{len(self._queue)} requests wait already")

    def charge(self, key: str, tokens: int) -> bytes:
        """Charge a request with a prompt of so many tokens to its key; returns header lines that say what is left.

        Raises:
            ApiError: 429, the key is over a limit.
        """
        verdict = self._rates.ask(key, tokens, time.monotonic())
        headers = rate_headers(verdict)
        if verdict.over:
            self._on_refused(f"{verdict.over}_per_minute")
            size = next(size for name, size, _, _ in verdict.limits if name == verdict.over)
            shared = f" at this one of {self.frontends} frontends" if self.frontends > 1 else ""
            raise ApiError(
                429,
                f"this key may use {size} {verdict.over} a minute{shared}: try again in {verdict.wait_s:.1f} s",
                retry_after_s=max(1, math.ceil(verdict.wait_s)),
                more_headers=headers,
            )
        return headers

    def answered(self, key: str, tokens: int) -> None:
        """Charge the tokens of an answer to its key."""
        self._rates.answered(key, tokens, time.monotonic())

    def refuse_all(self, message: str) -> None:
        """Refuse all that wait."""
        while self._queue:
            turn = self._queue.pop()
            if not turn.done():
                turn.set_exception(ApiError(503, message, retry_after_s=5))

    async def turn(self, key: str, tokens: int) -> None:
        """Wait for the turn of a request with a prompt of so many tokens.

        Raises:
            ApiError: 503, the queue is full, or it waited too long.
        """
        if not self._queue and self._room(self.thresholds):
            return
        if self._full(tokens):
            raise self._refusal("queue_full", f"{len(self._queue)} requests wait already")
        turn = asyncio.get_running_loop().create_future()
        self._queue.push(key, tokens, turn)
        self._look_later()
        timeout_s = self.thresholds.queue_timeout_s or None
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except TimeoutError:
            raise self._refusal("queue_timeout", f"no worker had room within {timeout_s:g} s") from None
        finally:
            self._queue.remove(key, turn)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """A request is with the workers: its end makes room."""
        try:
            yield
        finally:
            self._done.append(time.monotonic())
            if self._queue:
                self._look()

    def _look(self) -> None:
        """Let the next one pass if there is room; it is with a worker, and counts, before the next look."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if not self._queue:
            return
        if not self._room(self.thresholds):
            self._look_later()
            return
        turn = self._queue.pop()
        if not turn.done():
            turn.set_result(None)
        self._due = asyncio.get_running_loop().call_soon(self._look)

    def _look_later(self) -> None:
        """What workers report changes without a word to us."""
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _full(self, tokens: int) -> bool:
        limits, queue = self.thresholds, self._queue
        if not queue:
            return False
        too_many = limits.queue_requests and len(queue) >= limits.queue_requests
        return bool(too_many or (limits.queue_tokens and queue.tokens + tokens > limits.queue_tokens))

    def _refusal(self, why: str, message: str) -> ApiError:
        self._on_refused(why)
        spent_s = max(0.1, time.monotonic() - self._done[0])
        retry_s = math.ceil(max(1, len(self._queue)) * spent_s / len(self._done))
        return ApiError(
            503, f"the deployment is overloaded: {message}", retry_after_s=min(RETRY_MOST_S, max(1, retry_s))
        )


def _rates(limits: Thresholds) -> tuple[int, int]:
    return limits.requests_per_minute, limits.tokens_per_minute


def rate_headers(verdict: Verdict) -> bytes:
    """The header lines that OpenAI's clients read."""
    return b"".join(
        b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %.3fs\r\n"
        % (name.encode(), size, name.encode(), left, name.encode(), full_in_s)
        for name, size, left, full_in_s in verdict.limits
    )
