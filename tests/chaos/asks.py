"""Requests, and the answers that they must get.

The echo engine's text is computed here, token by token, and no two prompts are alike, so that the answer to one request is
wrong for every other. What vLLM says is asked of plain vLLM beforehand; its prompts come again and again, half of the time
under a salt of their own, so that both what is cached and what is pulled is looked at.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import httpx
from tokenizers import Tokenizer

from tests.reference import WORDS, plain_vllm
from workers.frontend.text import Text
from workers.runtime.wire import unpack

MODEL = "tiny"


class Behaviour(StrEnum):
    """What a client does with its answer."""

    READS = "reads"
    READS_SLOWLY = "reads slowly"
    LEAVES = "leaves"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request, its right answers by index, and what the client does; `patience_s` is when one that leaves has left."""

    number: int
    path: str
    body: dict[str, Any]
    answers: tuple[str, ...]
    prompt_tokens: int
    behaviour: Behaviour
    patience_s: float

    @property
    def streams(self) -> bool:
        """Whether the answer comes as events."""
        return bool(self.body.get("stream"))


class Supply(Protocol):
    """Requests without end."""

    def next(self) -> Ask:
        """Another request."""
        ...


class Asks:
    """An endless supply of requests, the same for the same seed."""

    def __init__(self, model: Path, seed: int) -> None:
        self._rng = random.Random(seed)
        self._text = Text(model)
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._number = 0

    def next(self) -> Ask:
        """Another request."""
        rng, self._number = self._rng, self._number + 1
        tokens, n = rng.randint(1, 120), rng.choice((1, 1, 1, 2))
        body: dict[str, Any] = {"model": MODEL, "max_tokens": tokens, "n": n, "stream": rng.random() < 0.75}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        said = f"{self._number}: " + " ".join(rng.choice(WORDS) for _ in range(rng.choice((3, 20, 100, 400))))
        if rng.random() < 0.5:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": said}]
            ids = unpack(self._text.chat(body["messages"], {}))
        else:
            path, body["prompt"] = "/v1/completions", said
            ids = unpack(self._text.encode(said))
        behaviour = rng.choices((Behaviour.READS, Behaviour.READS_SLOWLY, Behaviour.LEAVES), (8, 1, 2))[0]
        return Ask(
            number=self._number,
            path=path,
            body=body,
            answers=(self._echo(ids, tokens),) * n,
            prompt_tokens=len(ids),
            behaviour=behaviour,
            patience_s=rng.random() * rng.choice((0.05, 0.5, 3.0)),
        )

    def _echo(self, ids: list[int], tokens: int) -> str:
        """What `workers.engine.echo` says: the prompt's tokens, over and over."""
        said = (ids[number % len(ids)] for number in range(tokens))
        return "".join(self._tokenizer.decode([token], skip_special_tokens=False) for token in said)


class Recorded:
    """An endless supply of some requests, answered by plain vLLM beforehand."""

    def __init__(self, asks: Iterable[Ask], seed: int) -> None:
        self._asks = list(asks)
        self._rng = random.Random(seed)
        self._number = 0

    def next(self) -> Ask:
        """Another request."""
        rng, self._number = self._rng, self._number + 1
        ask = rng.choice(self._asks)
        stream = rng.random() < 0.75
        body = {**ask.body, "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}
        if rng.random() < 0.5:
            body["cache_salt"] = f"salt {self._number}"
        behaviour = rng.choices((Behaviour.READS, Behaviour.READS_SLOWLY, Behaviour.LEAVES), (8, 1, 2))[0]
        patience_s = rng.random() * rng.choice((0.05, 0.5, 3.0))
        return replace(ask, number=self._number, body=body, behaviour=behaviour, patience_s=patience_s)


def recorded(model: Path, folder: Path, seed: int, count: int) -> Recorded:
    """Ask plain vLLM for that many different answers; its server is ended before this returns."""
    supply = Asks(model, seed)
    greedy = {"temperature": 0, "ignore_eos": True, "n": 1}  # vLLM refuses several greedy answers to one prompt
    asks = [supply.next() for _ in range(count)]
    with plain_vllm(model, folder) as base, httpx.Client(base_url=base, timeout=120) as client:

        def answered(ask: Ask) -> Ask:
            body = {
                "model": MODEL,
                **{key: ask.body[key] for key in ask.body if not key.startswith("stream")},
                **greedy,
            }
            answer = client.post(ask.path, json=body).raise_for_status().json()
            choice = answer["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            prompt_tokens = answer["usage"]["prompt_tokens"]
            return replace(ask, body=body, answers=(text,), prompt_tokens=prompt_tokens)

        with ThreadPoolExecutor(8) as pool:
            return Recorded(pool.map(answered, asks), seed)
