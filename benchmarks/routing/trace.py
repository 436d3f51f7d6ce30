"""A trace of conversations: shared beginnings, growing prompts, think times; the same from the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

VOCABULARY = (100, 1900)
APPS = 8
CONVERSATIONS = 320
CONTEXT = 4000


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: it comes `think_s` after the end of its conversation's turn before, the first one at `start_s`."""

    conversation: int
    number: int
    start_s: float
    think_s: float
    prompt: tuple[int, ...]
    answer: int
    """Tokens of the answer; an echo says the prompt again, and so does the conversation."""


def echoed(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What an echo engine answers."""
    return tuple(prompt[at % len(prompt)] for at in range(count))


def conversations(seed: int = 0, rate_per_s: float = 4.0) -> list[list[Turn]]:
    """The turns of each conversation; of eight applications some are asked more often than others.

    An application's system prompt has 200 to 800 tokens, a user's turn 20 to 240, an answer 16 to 64.
    """
    rng = random.Random(seed)

    def words(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(*VOCABULARY) for _ in range(count))

    systems = [words(rng.randrange(200, 801)) for _ in range(APPS)]
    popularity = [1 / (1 + rank) ** 0.8 for rank in range(APPS)]
    starts = list(accumulate(rng.expovariate(rate_per_s) for _ in range(CONVERSATIONS)))
    found = []
    for number, start in enumerate(starts):
        prompt = rng.choices(systems, popularity)[0]
        turns: list[Turn] = []
        for turn in range(rng.randrange(3, 14)):
            prompt = prompt + words(rng.randrange(20, 241))
            answer = rng.randrange(16, 65)
            if len(prompt) + answer > CONTEXT:
                break
            turns.append(Turn(number, turn, start, rng.expovariate(1 / 5.0), prompt, answer))
            prompt = prompt + echoed(prompt, answer)
        found.append(turns)
    return found
