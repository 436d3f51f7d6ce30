"""What each worker was given to do lately, so that no worker does more than the others for long.

The router's book says what is under way; where each request ends before the next one comes, it is empty, and what workers cache
alone would decide: those that happened to compute the popular beginnings would get all that begins with them. Work counts
half after every `HALF_S`. It is this frontend's own: those who balance their own requests balance the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.frontend.book import Key

HALF_S = 30.0
STEP_S = 1.0
FORGOTTEN = 1e-6
REQUEST_TOKENS = 64
"""Prompt tokens that a request counts for beside those to be computed: its answer, of which nothing is known yet."""


class Shares:
    """Tokens of work by worker and rank."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is in seconds."""
        self._clock = clock
        self._at = clock()
        self._given: dict[Key, float] = {}

    def note(self, key: Key, tokens: int) -> None:
        """A worker was sent a prompt of which it has to compute so many tokens."""
        self._fade()
        self._given[key] = self._given.get(key, 0.0) + tokens + REQUEST_TOKENS

    def of(self, keys: Sequence[Key]) -> list[float]:
        """What each of these was given lately, in whole tokens; who is seen for the first time begins with as much as the least of the others.

        Else a worker that comes back would get all requests until it has caught up.
        """
        self._fade()
        given = self._given
        try:
            return [given[key] // 1 for key in keys]
        except KeyError:
            # The first ones begin with a token: nothing at all would be forgotten at once.
            least = min((given[key] for key in keys if key in given), default=1.0)
            return [given.setdefault(key, least) // 1 for key in keys]

    def __len__(self) -> int:
        """Number of workers of which something is kept."""
        return len(self._given)

    def _fade(self) -> None:
        passed = self._clock() - self._at
        if passed >= STEP_S:
            self._at += passed
            rest = 0.5 ** (passed / HALF_S)
            # Workers that left are forgotten, ten minutes and more after their last work.
            self._given = {key: left for key, before in self._given.items() if (left := before * rest) >= FORGOTTEN}
