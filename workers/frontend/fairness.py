"""Who is next and who has had enough: a fair queue and rate limits. Pure: time comes in as a number of seconds."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
MINUTE_S = 60.0


class FairQueue(Generic[T]):
    """Deficit round robin (Shreedhar and Varghese, 1995): keys take turns, and each turn is worth the same number of tokens.

    So a key that asks for much, or in large pieces, delays its own requests and not those of others: while two keys both
    wait, what they have been given differs by at most a turn and their largest request. Within a key the order stays.
    """

    def __init__(self, turn_tokens: int = 4096) -> None:
        self._turn_tokens = turn_tokens
        self._waiting: OrderedDict[str, deque[tuple[int, T]]] = OrderedDict()
        self._credit: dict[str, int] = {}
        self._count = 0
        self.tokens = 0
        """Sum of what waits."""

    def __len__(self) -> int:
        return self._count

    def push(self, key: str, tokens: int, item: T) -> None:
        """Let an item of that many tokens wait."""
        self._waiting.setdefault(key, deque()).append((tokens, item))
        self._count += 1
        self.tokens += tokens

    def pop(self) -> T:
        """The next item.

        Raises:
            IndexError: Nothing waits.
        """
        if not self._count:
            raise IndexError("nothing waits")
        while True:
            key, items = next(iter(self._waiting.items()))
            credit = self._credit.get(key, 0)
            tokens, item = items[0]
            if credit >= tokens:
                self._credit[key] = credit - tokens
                items.popleft()
                self._gone(key, tokens)
                return item
            self._credit[key] = credit + self._turn_tokens
            self._waiting.move_to_end(key)

    def remove(self, key: str, item: T) -> bool:
        """Take out an item that no longer wants its turn; False when it has had it."""
        for entry in self._waiting.get(key, ()):
            if entry[1] is item:
                self._waiting[key].remove(entry)
                self._gone(key, entry[0])
                return True
        return False

    def _gone(self, key: str, tokens: int) -> None:
        self._count -= 1
        self.tokens -= tokens
        if not self._waiting[key]:  # credit is for those that wait: who comes back begins anew
            del self._waiting[key]
            self._credit.pop(key, None)


@dataclass(slots=True)
class Allowance:
    """A token bucket: `per_minute` units flow in evenly, at most a minute's worth is kept, and debts are possible."""

    per_minute: int
    level: float
    at: float

    @classmethod
    def full(cls, per_minute: int, now: float) -> Allowance:
        """One that nothing was taken from."""
        return cls(per_minute, float(per_minute), now)

    def wait_s(self, now: float, units: int) -> float:
        """Seconds until that much may be taken, 0 if it may now. What is more than a minute's worth waits for a full one."""
        self._flow(now)
        lacking = min(units, self.per_minute) - self.level
        return max(0.0, lacking * MINUTE_S / self.per_minute)

    def take(self, now: float, units: int) -> None:
        """Take that much, whether or not it is there."""
        self._flow(now)
        self.level -= units

    def resize(self, now: float, per_minute: int) -> None:
        """Another size from now on; the same share of it is left, and of debts."""
        self._flow(now)
        self.level *= per_minute / self.per_minute
        self.per_minute = per_minute

    def full_in_s(self, now: float) -> float:
        """Seconds until it is full again."""
        return self.wait_s(now, self.per_minute)

    def _flow(self, now: float) -> None:
        passed, self.at = max(0.0, now - self.at), max(self.at, now)
        self.level = min(float(self.per_minute), self.level + passed * self.per_minute / MINUTE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a key's limits say to a request. `over` names the limit that it is over, "" if none.

    Attributes:
        over: requests, tokens, or nothing.
        wait_s: Seconds until the same request may pass.
        limits: For each limit that there is: its name, size, what is left of it, and the seconds until it is full again.
    """

    over: str
    wait_s: float
    limits: tuple[tuple[str, int, int, float], ...]


UNLIMITED = Verdict(over="", wait_s=0.0, limits=())


class Rates:
    """Requests and tokens a minute, of every key; a limit of 0 is none.

    A request is charged its prompt when it comes and its answer when that is known, so that a key may overdraw by the
    answers that are running; it pays before its next request.
    """

    def __init__(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        self._sizes = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._keys: dict[str, dict[str, Allowance]] = {}

    def ask(self, key: str, tokens: int, now: float) -> Verdict:
        """Charge a request with a prompt of so many tokens, if it may pass."""
        allowances = self._of(key, now)
        if not allowances:
            return UNLIMITED
        units = {"requests": 1, "tokens": tokens}
        waits = {name: item.wait_s(now, units[name]) for name, item in allowances.items()}
        over = max(waits, key=lambda name: waits[name]) if any(waits.values()) else ""
        if not over:
            for name, item in allowances.items():
                item.take(now, units[name])
        limits = tuple(
            (name, item.per_minute, max(0, int(item.level)), item.full_in_s(now)) for name, item in allowances.items()
        )
        return Verdict(over=over, wait_s=waits[over] if over else 0.0, limits=limits)

    def answered(self, key: str, tokens: int, now: float) -> None:
        """Charge an answer."""
        allowance = self._of(key, now).get("tokens")
        if allowance is not None:
            allowance.take(now, tokens)

    def change(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        """Other limits from now on; every key begins with all of them."""
        self._sizes = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._keys.clear()

    def resize(self, requests_per_minute: int, tokens_per_minute: int, now: float) -> None:
        """The same limits in another size; every key keeps the share that it has left."""
        self._sizes = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        for allowances in self._keys.values():
            for name, item in allowances.items():
                item.resize(now, self._sizes[name])

    def _of(self, key: str, now: float) -> dict[str, Allowance]:
        found = self._keys.get(key)
        if found is None:
            found = {name: Allowance.full(size, now) for name, size in self._sizes.items() if size}
            if found:
                self._keys[key] = found
        return found
