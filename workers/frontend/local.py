"""Conditional disaggregation: when a decode worker computes a prompt itself. A pure decision.

Passing a prompt to a prefill worker costs a queue, a transfer and a second leg, and keeps the steps of a decode worker short.
For a short prompt that is not worth it, nor for one of which a decode worker caches all but a short rest. Under load it is worth it only as long as prefill workers keep up: a decode worker
that takes one prompt now and then answers it sooner than the queue would, and slows its own streams only while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from launch.recipe import LocalPrefillMode


class Reason(StrEnum):
    """Why a prompt was computed by a decode worker."""

    SHORT = "short"
    CACHED = "cached"
    LOAD = "load"
    READS_PROMPT = "reads_prompt"
    NO_PREFILL = "no_prefill"
    CUT = "cut"  # no prefill worker can be reached from a decode worker


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPrefill:
    """The policy of a deployment. Sizes are in tokens of prompts.

    Attributes:
        mode: never, short (only short prompts), or load (also while prefill workers are behind).
        short_tokens: Prompts up to this length are short.
        behind_tokens: Prefill workers are behind when the least loaded has this much to compute.
        room_tokens: A decode worker has room while what it computes of prompts, with the new one, is at most this.
    """

    mode: LocalPrefillMode = LocalPrefillMode.NEVER
    short_tokens: int = 256
    behind_tokens: int = 24576
    room_tokens: int = 8192

    def reason(
        self, tokens: int, prefills: Sequence[int], decodes: Sequence[int], cached: Callable[[], int] = lambda: 0
    ) -> Reason | None:
        """Why a decode worker should compute a prompt of that many tokens; None when a prefill worker should.

        Args:
            tokens: Length of the prompt.
            prefills: For each prefill worker the tokens that it has to compute.
            decodes: For each decode worker the prompt tokens that it has to compute itself.
            cached: The most tokens of the prompt that a decode worker caches.
        """
        if self.mode is LocalPrefillMode.NEVER:
            return None
        if tokens <= self.short_tokens:
            return Reason.SHORT
        if tokens - cached() <= self.short_tokens:
            return Reason.CACHED
        behind = self.mode is LocalPrefillMode.LOAD and min(prefills) >= self.behind_tokens
        return Reason.LOAD if behind and any(self.has_room(tokens, busy) for busy in decodes) else None

    def has_room(self, tokens: int, busy: int) -> bool:
        """Whether a decode worker that computes `busy` prompt tokens may take this prompt as well.

        One that is longer than the room fits where nothing else is computed: else it would never go.
        """
        return busy == 0 or busy + tokens <= self.room_tokens
