"""A worker is chosen by what it caches and what it has to do."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.recipe import Kind, LocalPrefillMode, RouterMode
from tests.workers.test_kv_view import SIZE, card
from workers.engine.kv_ledger import Ledger
from workers.frontend.block_index import BlockIndex
from workers.frontend.book import Book, Key, Load
from workers.frontend.errors import ApiError
from workers.frontend.kv_router import KvRouter, Weights, choose
from workers.frontend.kv_view import KvView
from workers.frontend.local import LocalPrefill, Reason
from workers.frontend.predictions import Predictions
from workers.frontend.router import Router, mode, session_choice
from workers.frontend.shares import Shares
from workers.frontend.sources import guess, sketch
from workers.frontend.wishes import Wishes, wishes
from workers.runtime.blocks import chain, root
from workers.runtime.kv_events import Tier
from workers.runtime.wire import pack


@dataclass
class Worker:
    """What the router looks at of a worker."""

    name: str
    in_flight: int = 0
    waiting: int = 0

    @property
    def key(self) -> Key:
        """Its instance and rank."""
        return self.name, 0

    @property
    def member(self) -> str:
        """Its name in the plan."""
        return f"aggregated-{self.name}"


@dataclass
class Ask:
    """What the router looks at of a request."""

    prompt: bytes
    adapter: str = ""
    wishes: Wishes = field(default_factory=Wishes)
    guess: int = 0

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt) // 4 or self.guess


class Fleet:
    """Workers with caches, and a router that knows them."""

    def __init__(self, names: str, events: bool = True, ttl_s: float = 60, **weights: float) -> None:
        self.workers = [Worker(name) for name in names]
        self.view = KvView(lambda member, ask: None, events, ttl_s)
        self.view.follow([card(name) for name in names])
        self.book = Book()
        self.now = 0.0
        self.kv = KvRouter(self.view, self.book, Weights(**weights), random.Random(1), lambda: self.now)

    def caches(self, name: str, ids: list[int], tier: Tier = Tier.DEVICE, adapter: str = "") -> None:
        """A worker has these tokens' blocks."""
        ledger = Ledger(name, 0, SIZE)
        ledger.stored(chain(pack(ids), SIZE, root(adapter)), tier)
        for page in ledger.picture():
            self.view.handle(page)

    def pick(self, ids: list[int], send: bool = False, adapter: str = "", computes: bool = True) -> str:
        """Who gets a prompt."""
        index, booking = self.kv.pick(self.workers, Ask(pack(ids), adapter), computes)
        if send:
            booking.begin()
        return self.workers[index].name


PROMPT = list(range(100, 140))


def test_a_prompt_goes_where_it_is_cached() -> None:
    """The longest prefix wins, with the right adapter only."""
    fleet = Fleet("abc")
    fleet.caches("b", PROMPT[:20])
    fleet.caches("c", PROMPT[:30])
    fleet.caches("a", PROMPT, adapter="other")

    assert [fleet.pick(PROMPT) for _ in range(5)] == ["c"] * 5
    assert fleet.pick(PROMPT, adapter="other") == "a"


def test_load_outweighs_a_cached_prefix_in_time() -> None:
    """Repeats of a prompt stay together until another worker would have it sooner."""
    fleet = Fleet("ab")
    fleet.caches("a", PROMPT)
    got = [fleet.pick(PROMPT, send=True) for _ in range(20)]

    assert got[:4] == ["a"] * 4
    assert Counter(got)["b"] >= 8


def test_a_weight_of_zero_looks_at_load_alone() -> None:
    """Equal prompts spread evenly."""
    fleet = Fleet("abcd", overlap=0.0)
    fleet.caches("a", PROMPT)
    got = Counter(fleet.pick(PROMPT, send=True) for _ in range(40))

    assert max(got.values()) - min(got.values()) <= 2


def test_a_long_prompt_at_one_worker_sends_the_next_to_another() -> None:
    """Before any event or report tells of it; once it is over and some time has passed, both are free again."""
    fleet = Fleet("ab")
    index, booking = fleet.kv.pick(fleet.workers, Ask(pack(range(1000, 3000))), True)
    booking.begin()
    other = fleet.workers[1 - index].name
    assert {fleet.pick([number] * 40) for number in range(10)} == {other}
    booking.prefilled()
    assert fleet.book.load(fleet.workers[index].key).tokens == 0
    booking.end()
    booking.end()

    fleet.now += 600
    assert fleet.book.own == {}
    assert {fleet.pick([number] * 40) for number in range(40)} == {"a", "b"}


def test_requests_that_never_meet_spread_over_all_that_cache_them_alike() -> None:
    """Each ends before the next begins, so that nothing is under way: what was given lately decides, in turns."""
    fleet = Fleet("abcd")
    for name in "abcd":
        fleet.caches(name, PROMPT[:8])
    got: Counter[str] = Counter()
    for number in range(40):
        index, booking = fleet.kv.pick(fleet.workers, Ask(pack(PROMPT[:8] + [number] * 32)), True)
        booking.begin()
        booking.prefilled()
        booking.end()
        got[fleet.workers[index].name] += 1

    assert got == dict.fromkeys("abcd", 10)


def test_a_conversation_leaves_a_worker_that_did_far_more_than_the_others() -> None:
    """It stays where it is cached while the others did as much, and does not for the sake of a short prefix."""
    fleet = Fleet("ab")
    fleet.caches("a", PROMPT)
    assert fleet.pick(PROMPT) == "a"
    fleet.kv.shares.note(("a", 0), 40_000)
    assert fleet.pick(PROMPT) == "b"
    fleet.kv.shares.note(("b", 0), 40_000)
    assert fleet.pick(PROMPT) == "a"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5000), st.floats(0, 40)), max_size=40))
def test_work_counts_half_after_half_a_minute(given: list[tuple[str, int, float]]) -> None:
    """Whatever is noted when; and nothing is kept of workers that got nothing for long."""
    now = 0.0
    shares = Shares(lambda: now)
    keys = [(name, 0) for name in "abc"]
    shares.of(keys)
    exact = dict.fromkeys("abc", 0.0)
    for name, tokens, passed in given:
        now += passed
        exact = {key: value * 0.5 ** (passed / 30) for key, value in exact.items()}
        exact[name] += tokens + 64
        shares.note((name, 0), tokens)
    kept = shares.of(keys)
    # It fades in steps of a second, and forgets less than a token.
    assert all(0.97 * value - 2 <= found <= value / 0.97 + 2 for found, value in zip(kept, exact.values(), strict=True))
    now += 3600
    assert shares.of([("a", 0)]) == [1.0]
    assert len(shares) == 1


def test_a_worker_that_comes_back_gets_no_more_than_its_part() -> None:
    """It begins with as much as the one that was given least, not with nothing."""
    shares = Shares(lambda: 0.0)
    shares.of([("a", 0), ("b", 0)])
    shares.note(("a", 0), 9000)
    shares.note(("b", 0), 5000)
    assert shares.of([("a", 0), ("b", 0), ("c", 0)])[1:] == [5065.0, 5065.0]


def test_what_was_sent_is_expected_before_events_tell() -> None:
    """A burst of one prompt's continuations follows it."""
    fleet = Fleet("abcdefgh")
    first, booking = fleet.kv.pick(fleet.workers, Ask(pack(PROMPT)), True)
    booking.begin()
    booking.end()
    second, again = fleet.kv.pick(fleet.workers, Ask(pack([*PROMPT, 7, 8, 9, 10])), True)

    assert second == first
    assert again.cached_tokens == 40
    assert again.tokens == 4


def test_events_make_predictions_superfluous() -> None:
    """A block that came and went is not expected any more."""
    fleet = Fleet("a")
    ledger = Ledger("a", 0, SIZE)
    for page in ledger.picture():
        fleet.view.handle(page)
    fleet.pick(PROMPT, send=True)
    names = chain(pack(PROMPT), SIZE, root())
    ledger.stored(names)
    told = ledger.take()
    assert told
    fleet.view.handle(told)
    assert len(fleet.view.predictions) == 0
    ledger.removed(names)
    told = ledger.take()
    assert told
    fleet.view.handle(told)

    assert fleet.view.overlaps(names) == {}


def test_without_events_what_was_sent_counts_for_a_while() -> None:
    """The same worker within the time to live; nobody afterwards."""
    fleet = Fleet("abcdefgh", events=False, ttl_s=60)
    fleet.view.expect(("c", 0), chain(pack(PROMPT), SIZE, root()))

    assert {fleet.pick(PROMPT) for _ in range(10)} == {"c"}
    assert fleet.view.troubles == []
    fleet.view.predictions.expire(now=math.inf)
    assert len({fleet.pick(PROMPT) for _ in range(40)}) > 4


def test_far_tiers_count_less() -> None:
    """Half a prompt on the device beats the same half in the host's memory, and this beats nothing."""
    fleet = Fleet("abc")
    fleet.caches("a", PROMPT[:20], Tier.HOST)
    assert fleet.pick(PROMPT) == "a"
    fleet.caches("b", PROMPT[:20], Tier.DEVICE)
    assert fleet.pick(PROMPT) == "b"


def test_a_worker_that_only_pulls_is_chosen_by_load() -> None:
    """What it caches decides between equals."""
    fleet = Fleet("ab")
    fleet.caches("a", PROMPT)
    assert {fleet.pick(PROMPT, computes=False) for _ in range(10)} == {"a"}
    fleet.book.change(("a", 0), 1, 6, 0)
    assert {fleet.pick(PROMPT, computes=False) for _ in range(10)} == {"b"}


@pytest.mark.parametrize(
    ("mode", "cached", "reason"),
    [
        pytest.param(LocalPrefillMode.SHORT, 936, Reason.CACHED, id="a short rest"),
        pytest.param(LocalPrefillMode.SHORT, 935, None, id="a long rest"),
        pytest.param(LocalPrefillMode.LOAD, 1000, Reason.CACHED, id="cached whole"),
        pytest.param(LocalPrefillMode.NEVER, 1000, None, id="never"),
    ],
)
def test_what_decode_caches_but_for_a_short_rest_it_computes(
    mode: LocalPrefillMode, cached: int, reason: Reason | None
) -> None:
    """Where decode workers compute prompts at all."""
    assert LocalPrefill(mode=mode, short_tokens=64).reason(1000, [0], [0], lambda: cached) is reason


def test_books_of_other_frontends_and_reports_count_once() -> None:
    """A report corrects the books by what they do not know of."""
    book = Book()
    book.change(("a", 0), 2, 10, 50)
    book.told("other", [(("a", 0), Load(1, 5, 20))])
    assert book.load(("a", 0)) == Load(3, 15, 70)
    book.reported(("a", 0), 18)
    assert book.load(("a", 0)) == Load(3, 18, 70)
    book.reported(("a", 0), 12)
    assert book.load(("a", 0)) == Load(3, 15, 70)
    book.told("other", [])
    assert book.load(("a", 0)) == Load(2, 10, 50)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=5), st.floats(0.01, 10))
def test_a_temperature_draws_the_better_more_often(costs: list[float], temperature: float) -> None:
    """At 0 the best is taken; else a cheaper worker is never drawn much less than a dearer one."""
    rng = random.Random(3)
    given = [0.0] * len(costs)
    assert costs[choose(costs, given, 0.0, rng)] == min(costs)
    drawn = Counter(choose(costs, given, temperature, rng) for _ in range(2000))
    best, worst = costs.index(min(costs)), costs.index(max(costs))
    assert drawn[best] >= drawn[worst] - 200


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 20), max_size=6)), max_size=30), st.integers(1, 8))
def test_predictions_stay_within_their_capacity(sent: list[tuple[int, list[int]]], capacity: int) -> None:
    """The table holds what is expected of somebody, and nothing else; the last prompt's beginning is in it."""
    predictions = Predictions(ttl_s=10)
    for holder, names in sent:
        predictions.expect(holder, names, now=0.0, capacity=capacity)
        if names:
            assert predictions.table[names[0]] >> holder & 1
    assert len(predictions) == sum(holders.bit_count() for holders in predictions.table.values())
    assert all(len(until) <= capacity for until in predictions._until.values())
    predictions.expire(now=10.0)
    assert predictions.table == {}


@given(st.lists(st.text(max_size=5), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 50))
def test_sessions_keep_their_worker_and_load_stays_bounded(sessions: list[str], workers: int, busy: int) -> None:
    """The same worker each time while nothing is busier than its share; never one beyond it."""
    names = [f"w{number}" for number in range(workers)]
    idle = [session_choice(session, names, [0] * workers) for session in sessions]
    assert idle == [session_choice(session, names, [0] * workers) for session in sessions]
    streams = [0] * workers
    streams[0] = busy
    for session in sessions:
        streams[session_choice(session, names, streams)] += 1
        assert max(streams[1:], default=0) <= math.ceil(1.25 * sum(streams) / workers)


def test_a_worker_that_leaves_moves_its_own_sessions_only() -> None:
    """The others stay where they are."""
    names = ["a", "b", "c", "d"]
    before = {session: names[session_choice(session, names, [0] * 4)] for session in map(str, range(200))}
    after = {session: ["a", "b", "c"][session_choice(session, names[:3], [0] * 3)] for session in before}

    assert all(after[session] == where for session, where in before.items() if where != "d")
    assert {where for session, where in after.items() if before[session] == "d"} == {"a", "b", "c"}


def test_clients_name_workers_where_they_may() -> None:
    """Each kind its own; one that is not there is an error, and so is a name where none is wanted, and none where one is."""
    workers = [Worker("0"), Worker("1")]
    simple = {kind: mode(RouterMode.ROUND_ROBIN) for kind in Kind}
    named = Ask(pack(PROMPT), wishes=wishes({"x-baton-worker": "decode-3, aggregated-1"}, {}))
    open_, strict = Router(choose=simple, direct=True), Router(choose=simple, direct=True, must_name=True)

    assert [open_.pick(Kind.AGGREGATED, workers, named, True)[0] for _ in range(3)] == [1, 1, 1]
    assert [open_.pick(Kind.PREFILL, workers, named, True)[0] for _ in range(3)] == [0, 1, 0]
    for router, kind, ask, status in (
        (Router(choose=simple), Kind.AGGREGATED, named, 403),
        (open_, Kind.DECODE, named, 503),
        (strict, Kind.AGGREGATED, Ask(pack(PROMPT)), 400),
    ):
        with pytest.raises(ApiError) as caught:
            router.pick(kind, workers, ask, True)
        assert caught.value.status == status


@pytest.mark.parametrize(
    ("headers", "fields", "session"),
    [
        pytest.param({"x-session-id": "h"}, {"prompt_cache_key": "k", "user": "u"}, "h", id="header"),
        pytest.param({}, {"prompt_cache_key": "k", "user": "u"}, "k", id="cache key"),
        pytest.param({}, {"user": "u"}, "u", id="user"),
        pytest.param({}, {"user": ["u"]}, "", id="nonsense"),
    ],
)
def test_a_session_is_what_the_client_calls_it(
    headers: dict[str, str], fields: dict[str, object], session: str
) -> None:
    """The header first."""
    assert wishes(headers, fields).session == session


def test_power_of_two_takes_the_less_loaded_of_two() -> None:
    """The busiest of all is never taken; the others all are."""
    workers = [Worker("a", in_flight=9), Worker("b"), Worker("c", waiting=1)]
    pick = mode(RouterMode.POWER_OF_TWO, random.Random(2))
    got = Counter(pick(workers) for _ in range(300))

    assert got[0] == 0
    assert got[1] > got[2] > 0


def test_random_is_even() -> None:
    """Within five standard deviations."""
    pick = mode(RouterMode.RANDOM, random.Random(2))
    got = Counter(pick([Worker("a"), Worker("b"), Worker("c"), Worker("d")]) for _ in range(4000))

    assert all(abs(count - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75) for count in got.values())


def test_the_index_knows_no_more_than_it_was_told() -> None:
    """An empty index finds nobody."""
    assert BlockIndex().overlap([1, 2, 3]) == {}


PICTURES = st.lists(st.sampled_from(["cat", "dog"]), max_size=2)
TALKS = st.lists(st.tuples(st.text("ab ", max_size=12), PICTURES), min_size=1, max_size=3)


def talk(turns: list[tuple[str, list[str]]]) -> dict[str, Any]:
    """A conversation with pictures, as a client sends it."""
    messages = []
    for text, pictures in turns:
        shown = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{name}"}} for name in pictures]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": text}]})
    return {"messages": messages}


@given(TALKS, TALKS)
def test_sketches_are_equal_as_far_as_conversations_are(one: list[Any], other: list[Any]) -> None:
    """A conversation that goes on keeps its beginning; another picture changes all from there on."""
    first, whole = sketch(talk(one)), sketch(talk([*one, *other]))
    assert whole.startswith(first)
    assert abs(len(first) - 4 * guess(talk(one))) <= 60 * len(one)
    changed = [(text, ["bird", *pictures]) for text, pictures in one]
    assert sketch(talk(changed))[:64] != first[:64]


def test_the_same_picture_goes_where_it_was_sent() -> None:
    """With what was said before it; another one is spread by load, and one that was not cached there is no longer expected."""
    fleet = Fleet("abcd")
    names = itertools.count()

    def send(text: str, picture: str, cached: float = 1.0) -> str:
        body = talk([(text, [picture]), (f"question {next(names)}", [])])
        wanted = Wishes(sketch=sketch(body))
        asked = Ask(b"", wishes=wanted, guess=guess(body))
        index, booking = Router(choose={}, kv=fleet.kv).pick(Kind.AGGREGATED, fleet.workers, asked, True)
        assert booking
        booking.begin()
        booking.prefilled()
        booking.end()
        # The medium takes other than the guessed number of tokens.
        booking.hit(round(200 * cached * booking.cached_tokens / asked.tokens), 200)
        return fleet.workers[index].name

    first = send("look", "cat", 0)
    assert [send("look", "cat") for _ in range(5)] == [first] * 5
    others = {send("look", f"picture {number}", 0) for number in range(8)}
    assert others >= set("abcd") - {first}
    assert send("look", "cat") == first
    assert len(fleet.view.predictions) == 0
    before = len(fleet.view.sketches)
    send("look", "picture 3", 0)
    assert len(fleet.view.sketches) < before
