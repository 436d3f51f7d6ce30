"""Requests, and the answers that they must get: the echo engine's text is computed here, token by token.

No two prompts are alike, so that the answer to one request is wrong for every other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.reference import WORDS
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
