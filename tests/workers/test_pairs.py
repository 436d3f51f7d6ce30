"""A prefill and a decode worker that cannot reach each other: nobody waits for them, and they are kept apart for a while."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import pytest

from launch.recipe import Kind
from tests.workers.test_partitions import Path
from tests.workers.test_peers import listener, port
from tests.workers.test_request_plane import Plane, Worker, pieces, plane, question
from workers.engine.base import Ask, PeerLostError, Piece
from workers.engine.echo import EchoEngine
from workers.engine.peers import ANSWER_S, Peers
from workers.frontend.exchange import Relay, answer
from workers.frontend.local import Reason
from workers.frontend.pairs import Pairs

__all__ = ["plane", "port"]  # the fixtures

SILENT_S = 2.0
# One question must time out before the silence is counted, and one may have been answered just before it.
NOTICED_S = SILENT_S + 3 * ANSWER_S
TOKENS = 20


@pytest.mark.parametrize(
    ("cuts", "later_s", "targets"),
    [
        pytest.param([], 0, set(), id="nothing is known"),
        pytest.param([("p1", "d1")], 0, {"d1"}, id="one of two decode workers cannot"),
        pytest.param([("p1", "d1"), ("p1", "d2")], 0, {"d1", "d2"}, id="neither can"),
        pytest.param([("p1", "d1"), ("p2", "d2")], 0, {"d1"}, id="each cannot reach another one"),
        pytest.param([("p1", "d1"), ("p1", "d2")], 31, set(), id="after a while it is tried again"),
    ],
)
def test_what_a_cut_pair_rules_out(cuts: list[tuple[str, str]], later_s: float, targets: set[str]) -> None:
    """The decode workers that cannot pull from p1, and whether there are any such pairs."""
    now = [100.0]
    pairs = Pairs(avoid_s=30, now=lambda: now[0])
    for pair in cuts:
        pairs.cut(*pair)
    now[0] += later_s

    assert pairs.targets("p1") == targets
    assert pairs.any is (later_s < 30 and bool(cuts))


async def test_a_pull_from_a_peer_that_falls_silent_is_ended(port: int) -> None:
    """Within its time and a question's; what was to be pulled is told, by cancelling it, that nobody waits."""
    ended = asyncio.Event()

    async def hangs() -> AsyncGenerator[str, None]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        yield "never"

    begun = time.monotonic()
    with pytest.raises(PeerLostError, match="has not answered"):
        await anext(Peers(SILENT_S).pulled(("127.0.0.1", port), hangs()))

    assert ended.is_set()
    assert SILENT_S <= time.monotonic() - begun < NOTICED_S + 2


async def test_a_slow_pull_from_a_peer_that_answers_is_waited_for(port: int) -> None:
    """However long it takes; and once it is done nobody is asked."""

    async def slow() -> AsyncGenerator[int, None]:
        await asyncio.sleep(SILENT_S + 2 * ANSWER_S)
        for number in range(3):
            yield number

    async with listener(port) as asked:
        found = [number async for number in Peers(SILENT_S).pulled(("127.0.0.1", port), slow())]
        before = len(asked)
        await asyncio.sleep(1.5 * ANSWER_S)

    assert found == [0, 1, 2]
    assert before == len(asked) >= 2


async def test_an_empty_stream_is_passed_on_as_one(port: int) -> None:
    """As from an engine that ended at once."""

    async def nothing() -> AsyncGenerator[int, None]:
        return
        yield

    assert [number async for number in Peers().pulled(("127.0.0.1", port), nothing())] == []


class Pulling(EchoEngine):
    """An engine that pulls as vLLM does: the peer is asked first; and while the path is cut a pull never ends."""

    def __init__(self, engine: EchoEngine, ways: dict[str, tuple[Path, int]]) -> None:
        """Make one of an echo; `ways` leads to the side channel of each prefill engine, by its id."""
        self.__dict__ = engine.__dict__
        self.ways = ways
        self.peers = Peers(SILENT_S)

    async def generate(self, ask: Ask) -> AsyncIterator[Piece]:
        """As an echo, once it has pulled."""
        stream = super().generate(ask)
        if ask.transfer is None:
            async for piece in stream:
                yield piece
            return
        path, at = next(way for name, way in self.ways.items() if name.encode() in ask.transfer)

        async def pulling() -> AsyncGenerator[Piece, None]:
            await path.open.wait()
            async for piece in stream:
                yield piece

        await self.peers.check(("127.0.0.1", at))
        async for piece in self.peers.pulled(("127.0.0.1", at), pulling()):
            yield piece


@contextlib.asynccontextmanager
async def pulled_over_paths(plane: Plane, port: int, prefills: int, decodes: int) -> AsyncIterator[list[list[Path]]]:
    """Prefill and decode workers, and the path from each decode worker to each prefill worker: `paths[decode][prefill]`."""
    sources = [plane.add(Kind.PREFILL) for _ in range(prefills)]
    targets = [plane.add(Kind.DECODE) for _ in range(decodes)]
    plane.pool.disaggregated = True
    async with contextlib.AsyncExitStack() as stack:
        for number in range(prefills):
            await stack.enter_async_context(listener(port + number))
        paths = []
        for target in targets:
            ways: dict[str, tuple[Path, int]] = {}
            for number, source in enumerate(sources):
                path = Path(port + number)
                ways[source.engine._id] = (path, await stack.enter_async_context(path.serving()))
            target.engine = target.server._engine = Pulling(target.engine, ways)
            paths.append([path for path, _ in ways.values()])
        await plane.ready(prefills + decodes)
        yield paths


async def asked_whole(plane: Plane, within_s: float) -> bytes:
    """The bytes of one answer."""
    written: list[bytes] = []
    asked = question(tokens=7, max_tokens=TOKENS)
    done = await asyncio.wait_for(answer(plane.pool, asked, Relay(written.append)), within_s)
    return b"".join(written) + done.data


async def undisturbed(worker: Worker) -> bytes:
    """What every answer must be."""
    return b"".join([data async for data in pieces(worker, question(tokens=7, max_tokens=TOKENS))])


def local_reasons(plane: Plane) -> list[Reason]:
    """Where the reasons will be noted for which decode workers compute prompts."""
    found: list[Reason] = []
    plane.pool.on_local = found.append
    return found


@pytest.mark.parametrize("known", [False, True], ids=["before they ever met", "while a pull runs"])
async def test_with_one_pair_the_decode_worker_computes_the_prompt(plane: Plane, port: int, known: bool) -> None:
    """The request that finds the cut is answered, later ones at once; when the pair is tried again it serves again."""
    async with pulled_over_paths(plane, port, 1, 1) as [[path]]:
        now = [time.monotonic()]
        plane.pool.pairs = Pairs(now=lambda: now[0])
        reasons = local_reasons(plane)
        right = await undisturbed(plane.workers[0])
        if known:
            assert await asked_whole(plane, 5) == right
            assert reasons == []
        path.open.clear()
        first = await asked_whole(plane, NOTICED_S + 3)
        later = [await asked_whole(plane, 1) for _ in range(3)]
        path.open.set()
        now[0] += 31
        healed = await asked_whole(plane, 5)

    assert {first, *later, healed} == {right}
    assert reasons == [Reason.CUT] * 4
    assert plane.legs[-2:] == [Kind.PREFILL, Kind.DECODE]


def first_prefill(paths: list[list[Path]]) -> list[Path]:
    """All paths to one prefill worker."""
    return [row[0] for row in paths]


def one_pair(paths: list[list[Path]]) -> list[Path]:
    """The path between two workers."""
    return [paths[0][0]]


async def test_the_last_attempt_pulls_nothing_where_pulls_have_failed(plane: Plane, port: int) -> None:
    """More pairs are cut than there are attempts, and none of them is known yet."""
    async with pulled_over_paths(plane, port, 1, 3) as paths:
        reasons = local_reasons(plane)
        right = await undisturbed(plane.workers[0])
        for path in first_prefill(paths):
            path.open.clear()
        answered = await asked_whole(plane, 3 * NOTICED_S)

    assert answered == right
    assert reasons == [Reason.CUT]


@pytest.mark.parametrize(
    ("prefills", "decodes", "cut"),
    [
        pytest.param(2, 1, first_prefill, id="another prefill worker"),
        pytest.param(1, 2, one_pair, id="another decode worker"),
        pytest.param(2, 2, first_prefill, id="a prefill worker that nobody reaches"),
    ],
)
async def test_another_pair_answers(
    plane: Plane, port: int, prefills: int, decodes: int, cut: Callable[[list[list[Path]]], list[Path]]
) -> None:
    """No prompt is computed twice by choice: none by a decode worker, and of those at once each finds the cut at most once."""
    async with pulled_over_paths(plane, port, prefills, decodes) as paths:
        reasons = local_reasons(plane)
        right = await undisturbed(plane.workers[0])
        for path in cut(paths):
            path.open.clear()
        answers = await asyncio.gather(*(asked_whole(plane, 2 * NOTICED_S) for _ in range(8)))
        later = [await asked_whole(plane, 1) for _ in range(4)]

    assert {*answers, *later} == {right}
    assert reasons == []
