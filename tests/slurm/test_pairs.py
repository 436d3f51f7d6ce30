"""All pairs of nodes: a schedule without collisions, a verdict that names what is slow, and its picture."""

from __future__ import annotations

import io
import itertools
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slurm.heatmap import GREEN, GREY, RED, WHITE, YELLOW, picture, png, shade
from slurm.pairs import Found, Matrix, matrix, names, opponents, rounds, verdict


@given(st.integers(0, 70))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(size: int) -> None:
    """In as few rounds as that takes."""
    told = rounds(size)

    for pairs in told:
        assert max(Counter(rank for pair in pairs for rank in pair).values(), default=0) <= 1
    assert sorted(pair for pairs in told for pair in pairs) == list(itertools.combinations(range(size), 2))
    assert len(told) == (size - 1 + size % 2 if size else 0)


@given(st.integers(2, 40))
def test_two_nodes_wait_for_each_other_only_in_the_order_of_the_rounds(size: int) -> None:
    """Each node goes through its own opponents; whoever is next for both sides exists until all are through."""
    left = [list(opponents(size, rank)) for rank in range(size)]

    while any(left):
        ready = [(a, left[a][0]) for a in range(size) if left[a] and left[left[a][0]][:1] == [a]]
        assert ready
        for a, _ in ready:
            left[a].pop(0)


def even(size: int) -> Matrix:
    """Nodes that are all alike: 2 us and 10 GB/s."""
    labels = [f"n{rank + 1}" for rank in range(size)]
    full = [[None if a == b else 1.0 for b in range(size)] for a in range(size)]
    return Matrix(
        names=labels,
        over="test",
        latency_us=[[value and 2.0 for value in row] for row in full],
        gb_per_s=[[value and 10.0 for value in row] for row in full],
    )


def changed(rates: dict[tuple[int, int], float | None], latencies: dict[tuple[int, int], float | None]) -> Matrix:
    """Four nodes, all alike but for these; latencies hold both ways."""
    made = msgspec.json.decode(msgspec.json.encode(even(4)), type=Matrix)
    for (a, b), value in rates.items():
        made.gb_per_s[a][b] = value
    for (a, b), value in latencies.items():
        made.latency_us[a][b] = made.latency_us[b][a] = value
    return made


@pytest.mark.parametrize(
    ("rates", "latencies", "slow"),
    [
        pytest.param({}, {}, [], id="all alike"),
        pytest.param({(0, 1): 5.0}, {(2, 3): 6.0}, [], id="just not slow"),
        pytest.param({(2, 1): 4.9}, {}, ["n3 -> n2: 4.90 GB/s, and the median is 10.00 GB/s"], id="one way"),
        pytest.param({}, {(0, 3): 6.1}, ["n1 - n4: 6.1 us, and the median is 2.0 us"], id="latency"),
        pytest.param({(0, 1): None}, {}, ["n1 - n2: not measured"], id="a rate is missing"),
        pytest.param({}, {(1, 2): None}, ["n2 - n3: not measured"], id="a latency is missing"),
        pytest.param(
            {(3, peer): 1.0 for peer in range(3)},
            {},
            [f"n4 -> n{peer}: 1.00 GB/s, and the median is 10.00 GB/s" for peer in (1, 2, 3)],
            id="a node that sends slowly",
        ),
    ],
)
def test_slow_pairs_are_named(
    rates: dict[tuple[int, int], float | None], latencies: dict[tuple[int, int], float | None], slow: list[str]
) -> None:
    """Under half of the median rate, over three times the median latency, or not there; with the values."""
    assert verdict(changed(rates, latencies)).slow == slow


def test_nothing_measured_is_a_verdict_as_well() -> None:
    """Every pair is named."""
    nothing: list[list[float | None]] = [[None] * 2 for _ in range(2)]
    told = verdict(Matrix(names=["a", "b"], over="test", latency_us=nothing, gb_per_s=nothing))

    assert (told.latency_us, told.gb_per_s, told.slow) == (None, None, ["a - b: not measured"])


def test_the_matrix_is_put_together_from_what_nodes_found() -> None:
    """Latencies hold for both, rates for their direction, and errors name both nodes."""
    found = [
        Found(rank=2, host="c.site", address="", over="x"),
        Found(rank=0, host="a.site", address="", over="x", latency_us={1: 5.0}, gb_per_s={1: 1.0}, errors={2: "no way"}),
        Found(rank=1, host="b.site", address="", over="x", gb_per_s={0: 2.0}, errors={1: "left nothing"}),
    ]  # fmt: skip

    made = matrix(found)

    assert made.names == ["a", "b", "c"]
    assert made.latency_us == [[None, 5.0, None], [5.0, None, None], [None, None, None]]
    assert made.gb_per_s == [[None, 1.0, None], [2.0, None, None], [None, None, None]]
    assert made.errors == ["a - c: no way", "b left nothing"]


def test_names_are_short_and_tell_nodes_apart() -> None:
    """As far as they are told apart by their hosts, else with the rank."""
    assert names(["n1.a", "n2.a", "n1.b"]) == ["n1#0", "n2", "n1#2"]


# --- the picture --------------------------------------------------------------------------------------------------------


def decoded(content: bytes) -> Image.Image:
    """As somebody else reads it."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


colours = st.tuples(*(st.integers(0, 255) for _ in range(3)))


@given(st.integers(1, 9).flatmap(lambda width: st.lists(st.lists(colours, min_size=width, max_size=width), min_size=1)))
def test_a_png_holds_its_pixels(rows: list[list[tuple[int, int, int]]]) -> None:
    """Any picture, read back by another program."""
    image = decoded(png(rows, {}))

    assert (image.size, image.mode) == ((len(rows[0]), len(rows)), "RGB")
    assert [[image.getpixel((x, y)) for x in range(len(rows[0]))] for y in range(len(rows))] == rows


def test_the_picture_shows_slow_pairs_in_red() -> None:
    """Rates left, latencies right; what was not measured is grey, and a node with itself white."""
    image = decoded(picture(changed({(0, 1): 5.0, (2, 0): 7.5, (1, 3): None}, {(0, 3): 7.0})))
    height, cell = image.size[1], image.size[1] // 4

    def at(a: int, b: int, right: bool = False) -> object:
        return image.getpixel((cell * b + cell // 2 + (height + cell if right else 0), cell * a + cell // 2))

    assert image.size == (9 * cell, 4 * cell)
    assert [at(0, 0), at(1, 0), at(0, 1), at(2, 0), at(1, 3)] == [WHITE, GREEN, RED, YELLOW, GREY]
    assert [at(3, 0, right=True), at(1, 2, right=True), at(2, 2, right=True)] == [RED, GREEN, WHITE]
    assert image.info["nodes"] == "n1 n2 n3 n4"


def test_a_picture_of_many_nodes_stays_small() -> None:
    """Of hundreds of nodes too, a pixel for each pair."""
    assert decoded(picture(even(300))).size == (601, 300)


@given(st.floats(-10, 10))
def test_shades_go_from_green_to_red(badness: float) -> None:
    """And no further, whatever was measured."""
    red, green, blue = shade(badness)

    assert all(0 <= value <= 255 for value in (red, green, blue))
    assert badness > 0 or (red, green, blue) == GREEN
    assert badness < 1 or (red, green, blue) == RED
