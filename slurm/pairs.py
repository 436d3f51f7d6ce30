"""All pairs of nodes: who is tested with whom when, and what the results say. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec

SLOW_RATE = 0.5
SLOW_LATENCY = 3.0


class Found(msgspec.Struct, kw_only=True, frozen=True):
    """What the node `rank` found: latency in us (one way) by peer, each pair once, and GB/s from here to each peer.

    `over` is what carried it; `errors` are the peers that were not reached, with the reason; its own
    rank stands for all.
    """

    rank: int
    host: str
    address: str
    over: str
    latency_us: dict[int, float] = {}
    gb_per_s: dict[int, float] = {}
    errors: dict[int, str] = {}


class Matrix(msgspec.Struct, kw_only=True, frozen=True):
    """`latency_us[a][b]` is one way between a and b, the same for both; `gb_per_s[a][b]` is from a to b. None: not measured."""

    names: list[str]
    over: str
    latency_us: list[list[float | None]]
    gb_per_s: list[list[float | None]]
    errors: list[str] = []


class Verdict(msgspec.Struct, kw_only=True, frozen=True):
    """The medians of all pairs, and every pair that falls short of them, in words."""

    latency_us: float | None
    gb_per_s: float | None
    slow: list[str] = []


def rounds(size: int) -> list[list[tuple[int, int]]]:
    """A tournament: each pair (a, b), a < b, once; no node twice in a round; n - 1 rounds, or n for an odd n.

    By the circle method: one stays, the others move on by one place in each round, and the opposite ones play.
    """
    players: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    told = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        across = zip(players[:half], reversed(players[half:]), strict=True)
        told.append([(min(a, b), max(a, b)) for a, b in across if a is not None and b is not None])
        players = [players[0], players[-1], *players[1:-1]]
    return told


def opponents(size: int, rank: int) -> Iterator[int]:
    """Whom a node is tested with, in this order."""
    for pairs in rounds(size):
        yield from (b if a == rank else a for a, b in pairs if rank in (a, b))


def names(hosts: Sequence[str]) -> list[str]:
    """Short names of nodes; with the rank where two are the same."""
    short = [host.partition(".")[0] for host in hosts]
    often = Counter(short)
    return [f"{name}#{rank}" if often[name] > 1 else name for rank, name in enumerate(short)]


def matrix(found: Sequence[Found]) -> Matrix:
    """Put together what the nodes found, in the order of their ranks."""
    by_rank = {item.rank: item for item in found}
    size = len(by_rank)
    labels = names([by_rank[rank].host for rank in range(size)])
    latency = [[by_rank[min(a, b)].latency_us.get(max(a, b)) for b in range(size)] for a in range(size)]
    rate = [[by_rank[a].gb_per_s.get(b) for b in range(size)] for a in range(size)]
    return Matrix(
        names=labels,
        over=", ".join(sorted({item.over for item in found})),
        latency_us=latency,
        gb_per_s=rate,
        errors=[
            f"{labels[rank]} - {labels[peer]}: {why}" if peer != rank else f"{labels[rank]} {why}"
            for rank, item in sorted(by_rank.items())
            for peer, why in sorted(item.errors.items())
        ],
    )


def verdict(asked: Matrix) -> Verdict:
    """Name the pairs slower than `SLOW_RATE` of the median rate or `SLOW_LATENCY` times the median latency, and missing ones.

    One way can be slow and the other not, so rates are named by their direction.
    """
    size = len(asked.names)
    once = [(a, b) for a in range(size) for b in range(a + 1, size)]
    ways = [(a, b) for a in range(size) for b in range(size) if a != b]
    latencies = {pair: value for pair in once if (value := asked.latency_us[pair[0]][pair[1]]) is not None}
    rates = {way: value for way in ways if (value := asked.gb_per_s[way[0]][way[1]]) is not None}
    usual, rate = _median(latencies), _median(rates)
    slow = []
    for a, b in once:
        between = f"{asked.names[a]} - {asked.names[b]}"
        if (a, b) not in latencies or (a, b) not in rates or (b, a) not in rates:
            slow.append(f"{between}: not measured")
            continue
        if usual is not None and latencies[a, b] > SLOW_LATENCY * usual:
            slow.append(f"{between}: {latencies[a, b]:.1f} us, and the median is {usual:.1f} us")
        for here, there in ((a, b), (b, a)):
            if rate is not None and rates[here, there] < SLOW_RATE * rate:
                way = f"{asked.names[here]} -> {asked.names[there]}"
                slow.append(f"{way}: {rates[here, there]:.2f} GB/s, and the median is {rate:.2f} GB/s")
    return Verdict(latency_us=usual, gb_per_s=rate, slow=slow)


def _median(values: Mapping[tuple[int, int], float]) -> float | None:
    return statistics.median(values.values()) if values else None
