"""Choose the worker for a leg of a request. A pure decision over what is known of the workers.

A client that names workers gets those, where the recipe allows it; one that names a session gets the worker of that session
as long as that is not busier than the others; else the mode of the recipe decides.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from launch.recipe import Kind, RouterMode, kind_of
from workers.frontend.errors import ApiError
from workers.frontend.kv_router import Ask, KvBooking, KvCandidate, KvRouter

SESSION_SLACK = 1.25
"""A session's worker may have this many times the mean of all streams."""


class Loaded(Protocol):
    """What the modes without a view of caches look at."""

    @property
    def in_flight(self) -> int:
        """Streams that this frontend has open there."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that the engine has queued, of all frontends, as last reported."""
        ...


class Candidate(KvCandidate, Loaded, Protocol):
    """What may be looked at of a worker."""


Mode = Callable[[Sequence[Loaded]], int]


def mode(name: RouterMode, rng: random.Random | None = None) -> Mode:
    """A function from candidates (never empty) to the index of the one to use.

    `kv` and `direct` stand for what they do without what they need: they take the least loaded.
    """
    turn = itertools.count()
    dice = rng or random.Random()

    def round_robin(candidates: Sequence[Loaded]) -> int:
        return next(turn) % len(candidates)

    def at_random(candidates: Sequence[Loaded]) -> int:
        return dice.randrange(len(candidates))

    def power_of_two(candidates: Sequence[Loaded]) -> int:
        if len(candidates) == 1:
            return 0
        pair = dice.sample(range(len(candidates)), 2)
        return min(pair, key=lambda index: candidates[index].in_flight + candidates[index].waiting)

    def least_loaded(candidates: Sequence[Loaded]) -> int:
        # Equal loads take turns: a burst that arrives before the first report must spread.
        first, count = next(turn), len(candidates)
        ranked = [
            (candidate.in_flight + candidate.waiting, (index - first) % count, index)
            for index, candidate in enumerate(candidates)
        ]
        return min(ranked)[2]

    modes = {
        RouterMode.ROUND_ROBIN: round_robin,
        RouterMode.RANDOM: at_random,
        RouterMode.POWER_OF_TWO: power_of_two,
    }
    return modes.get(name, least_loaded)


def session_choice(session: str, names: Sequence[str], in_flight: Sequence[int]) -> int:
    """Index of a session's worker: the first in an order of its own that has no more than its share of the streams.

    The order is that of hashes of session and worker, so that a worker that comes or goes moves its own sessions only; the
    bound is that of consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018).
    """
    bound = math.ceil(SESSION_SLACK * (sum(in_flight) + 1) / len(names))

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{len(session)}:{session}{names[index]}".encode(), digest_size=8).digest()

    order = sorted(range(len(names)), key=rank)
    return next(index for index in order if in_flight[index] < bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """How legs find their workers.

    Attributes:
        choose: The mode for each kind of worker; used where `kv` is not, or knows nothing.
        kv: Chooses by what workers cache; None in other modes.
        sessions: Whether a session that the client names keeps its worker.
        direct: Whether clients may name workers; with `must_name` they have to.
        must_name: Mode `direct`.
    """

    choose: Mapping[Kind, Mode]
    kv: KvRouter | None = None
    sessions: bool = False
    direct: bool = False
    must_name: bool = False

    def pick(
        self, kind: Kind, candidates: Sequence[Candidate], ask: Ask, computes: bool
    ) -> tuple[int, KvBooking | None]:
        """The index of the worker for a leg, and the leg in the book where one is kept.

        Args:
            kind: What the workers are for.
            candidates: Those that may be asked; never empty.
            ask: The request.
            computes: Whether the prompt is computed there; else its cache is pulled from elsewhere.

        Raises:
            ApiError: The client named a worker and may not, or that one is not there, or it had to and did not.
        """
        index: int | None = None
        named = [name for name in ask.wishes.members if kind_of(name) == kind]
        if ask.wishes.members and not self.direct:
            raise ApiError(
                403, "workers are chosen by the router here: launch with frontend.router_direct=true to name them"
            )
        if named:
            index = next((at for at, item in enumerate(candidates) if item.member in named), None)
            if index is None:
                there = ", ".join(sorted({item.member for item in candidates}))
                raise ApiError(
                    503,
                    f"worker {named[0]} is not ready, or there is none of that name; ready are {there}",
                    retry_after_s=1,
                )
        elif self.must_name and kind is not Kind.ENCODE:
            raise ApiError(400, f"frontend.router=direct: name a {kind} worker in the header x-baton-worker")
        elif self.sessions and ask.wishes.session:
            names = [f"{item.member}/{item.key[1]}" for item in candidates]
            index = session_choice(ask.wishes.session, names, [item.in_flight for item in candidates])
        if self.kv is not None and kind is not Kind.ENCODE and (ask.prompt or ask.wishes.sketch):
            return self.kv.pick(candidates, ask, computes, index)
        return (self.choose[kind](candidates) if index is None else index), None
