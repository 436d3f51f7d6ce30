"""The queue is fair by tokens, and limits let through what they say."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.frontend.fairness import Allowance, FairQueue, Rates

KEYS = st.sampled_from("abcd")
SIZES = st.integers(1, 9000)
TURN = 1000


@given(st.lists(st.tuples(KEYS, SIZES)))
def test_everything_comes_out_once_and_in_the_order_of_its_key(pushed: list[tuple[str, int]]) -> None:
    """Nothing is lost or overtaken by its own kind."""
    queue: FairQueue[tuple[str, int]] = FairQueue(TURN)
    for number, (key, tokens) in enumerate(pushed):
        queue.push(key, tokens, (key, number))
    assert queue.tokens == sum(tokens for _, tokens in pushed)
    came = [queue.pop() for _ in range(len(queue))]

    for key in "abcd":
        assert [item for item in came if item[0] == key] == [
            (key, number) for number, (pushed_key, _) in enumerate(pushed) if pushed_key == key
        ]
    assert (len(queue), queue.tokens) == (0, 0)
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(SIZES, min_size=1, max_size=30), st.lists(SIZES, min_size=1, max_size=30))
def test_keys_that_wait_are_given_the_same(mine: list[int], yours: list[int]) -> None:
    """To a turn and the largest request, at every moment at which both have waited all the time."""
    queue: FairQueue[tuple[str, int]] = FairQueue(TURN)
    for tokens in mine:
        queue.push("mine", tokens, ("mine", tokens))
    for tokens in yours:
        queue.push("yours", tokens, ("yours", tokens))
    left = {"mine": len(mine), "yours": len(yours)}
    given_: dict[str, int] = defaultdict(int)
    while all(left.values()):
        key, tokens = queue.pop()
        left[key] -= 1
        given_[key] += tokens
        assert abs(given_["mine"] - given_["yours"]) <= TURN + max(*mine, *yours)


@given(st.lists(st.tuples(KEYS, SIZES), min_size=1), st.data())
def test_what_is_taken_out_never_comes(pushed: list[tuple[str, int]], data: st.DataObject) -> None:
    """And is not counted any more."""
    queue: FairQueue[object] = FairQueue(TURN)
    items = [(key, tokens, object()) for key, tokens in pushed]
    for key, tokens, item in items:
        queue.push(key, tokens, item)
    gone = data.draw(st.sets(st.sampled_from(range(len(items)))))
    for number in gone:
        assert queue.remove(items[number][0], items[number][2])
        assert not queue.remove(items[number][0], items[number][2])
    kept = [entry for number, entry in enumerate(items) if number not in gone]

    assert queue.tokens == sum(tokens for _, tokens, _ in kept)
    assert {id(queue.pop()) for _ in range(len(queue))} == {id(item) for _, _, item in kept}


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 300)), max_size=60),
)
def test_an_allowance_never_gives_more_than_its_rate_and_a_minute(
    per_minute: int, asked: list[tuple[float, int]]
) -> None:
    """Over any time: what one minute keeps and what flows in; a piece larger than that passes when it is full."""
    allowance, now, taken = Allowance.full(per_minute, 0.0), 0.0, 0
    for pause, units in asked:
        now += pause
        if allowance.wait_s(now, units) == 0:
            allowance.take(now, units)
            taken += units
            overdraft = max(0, units - per_minute)
            assert taken <= per_minute * (1 + now / 60) + overdraft + 1e-6 * per_minute
        else:
            later = now + allowance.wait_s(now, units) + 1e-6
            assert replace(allowance).wait_s(later, units) == 0


def test_a_key_over_its_requests_waits_while_others_pass() -> None:
    """It is told for how long, and what it has left."""
    rates = Rates(requests_per_minute=2, tokens_per_minute=0)
    assert [rates.ask("a", 10, now=0.0).over for _ in range(3)] == ["", "", "requests"]
    verdict = rates.ask("a", 10, now=10.0)

    assert verdict.over == "requests"
    assert verdict.wait_s == pytest.approx(20.0)
    assert verdict.limits[0][:3] == ("requests", 2, 0)
    assert verdict.limits[0][3] == pytest.approx(50.0)
    assert rates.ask("b", 10, now=10.0).over == ""
    assert rates.ask("a", 10, now=30.1).over == ""


def test_answers_count_against_the_tokens_of_a_key() -> None:
    """When they are known; the next request waits until the debt is paid."""
    rates = Rates(requests_per_minute=0, tokens_per_minute=600)
    assert rates.ask("a", 100, now=0.0).over == ""
    rates.answered("a", 1000, now=0.0)
    verdict = rates.ask("a", 100, now=0.0)

    assert verdict.over == "tokens"
    assert verdict.wait_s == pytest.approx(60.0)
    assert rates.ask("a", 100, now=60.1).over == ""


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 2000), st.floats(0, 90))
def test_a_key_keeps_its_share_when_limits_are_divided_anew(before: int, after: int, used: int, passed: float) -> None:
    """Neither the coming nor the going of a frontend gives a key a new minute, and debts stay debts."""
    rates = Rates(requests_per_minute=0, tokens_per_minute=before)
    rates.ask("a", 0, now=0.0)
    rates.answered("a", used, now=0.0)
    level = min(before, before - used + passed * before / 60)
    rates.resize(0, after, now=passed)
    ((_, size, left, _),) = rates.ask("a", 0, now=passed).limits

    assert size == after
    assert left == pytest.approx(max(0, int(level * after / before)), abs=1)


def test_without_limits_nothing_is_kept() -> None:
    """And nothing is said."""
    rates = Rates(0, 0)

    assert rates.ask("a", 10**9, now=0.0).limits == ()
    assert rates._keys == {}
