"""Frontend and workers over real sockets in one process, with echo engines: who answers, and what happens when one goes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer

from launch.recipe import Kind, LocalPrefillMode, RouterMode
from slurm import ports
from workers.engine import transfer
from workers.engine.base import Ask, Piece
from workers.engine.echo import EchoEngine
from workers.engine.render import Choice
from workers.engine.server import RequestServer
from workers.frontend.errors import ApiError
from workers.frontend.exchange import Pool, Question, Relay, Releaser, answer
from workers.frontend.links import Links
from workers.frontend.local import LocalPrefill, Reason
from workers.frontend.router import Router, mode
from workers.frontend.wishes import Wishes
from workers.runtime import wire
from workers.runtime.curve import ClientKeys, ServerKeys
from workers.runtime.registry import Card

WORKER, FRONTEND, STRANGER = ([key.decode() for key in zmq.curve_keypair()] for _ in range(3))
OURS = ClientKeys(WORKER[0], *FRONTEND)
RENDER = wire.Render(wire.Shape.COMPLETION, True, False, "{", "}", 0)


class Worker:
    """A request server with an echo engine at a port of its own."""

    def __init__(self, kind: Kind, port: int, name: str, model: Path, interval_s: float) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.engine = EchoEngine(Tokenizer.from_file(str(model / "tokenizer.json")), interval_s)
        self.server = RequestServer(self.engine, name, CollectorRegistry())
        self.card = Card(
            member=f"{kind}-{port}",
            instance=name,
            kind=kind,
            address=f"tcp://127.0.0.1:{port}",
            metrics="",
            model="m",
            max_model_len=4096,
            block_size=32,
            version="echo",
        )
        self.server.bind(self.context, self.card.address, ServerKeys(WORKER[0], WORKER[1], (FRONTEND[0],)))
        self._beat = asyncio.create_task(self.server.beat())

    async def busy(self) -> None:
        """Wait until it serves a request."""
        async with asyncio.timeout(10):
            while not self.server.streams:
                await asyncio.sleep(0.01)

    def die(self) -> None:
        """As when the process is killed: the connection breaks, nothing more is said."""
        self._beat.cancel()
        for task in self.server._tasks.values():
            task.cancel()
        assert self.server._socket
        self.server._socket.close()
        if self.server._door:
            self.server._door.close()
        self.context.destroy(linger=0)


def in_turns(direct: bool = False) -> Router:
    """Workers are asked in turns; with `direct` clients may name one."""
    return Router(choose={kind: mode(RouterMode.ROUND_ROBIN) for kind in Kind}, direct=direct)


class Plane:
    """Workers, and a frontend's view of them."""

    def __init__(self, base: int, model: Path, stall_timeout_s: float) -> None:
        self._base = base
        self._model = model
        self.workers: list[Worker] = []
        self.links = Links(OURS, stall_timeout_s, lambda: None)
        self.legs: list[Kind] = []
        self.pool = Pool(
            self.links,
            in_turns(),
            disaggregated=False,
            on_leg=self.legs.append,
        )

    def add(self, kind: Kind = Kind.AGGREGATED, interval_s: float = 0.0, port: int | None = None) -> Worker:
        """Start a worker and tell the frontend."""
        number = len(self.workers)
        worker = Worker(kind, port or self._base + number, f"w{number}", self._model, interval_s)
        self.workers.append(worker)
        self.links.update({item.card.member: item.card for item in self.workers})
        return worker

    async def ready(self, count: int) -> None:
        """Wait until that many workers are usable."""
        async with asyncio.timeout(10):
            while sum(link.usable for link in self.links) != count:
                await asyncio.sleep(0.01)

    def close(self) -> None:
        """End everything."""
        self.links.close()
        for worker in self.workers:
            with contextlib.suppress(AssertionError, zmq.ZMQError):
                worker.die()


@pytest.fixture
async def plane(tiny_model: Path) -> AsyncIterator[Plane]:
    """A frontend without workers; they are added."""
    with ports.claim("request-plane", os.getpid()) as block:
        base = block.base
    running = Plane(base, tiny_model, stall_timeout_s=2.0)
    keeper = asyncio.create_task(running.links.keep())
    yield running
    keeper.cancel()
    running.close()


def question(tokens: int = 8, max_tokens: int = 16) -> Question:
    """A prompt and what is wanted of it."""
    prompt = wire.pack(range(20, 20 + tokens))
    return Question(request_id="r", prompt=prompt, max_tokens=max_tokens, render=RENDER)


async def test_an_answer_streams_and_counts(plane: Plane) -> None:
    """Each token once; the rest of the bytes with the end."""
    plane.add()
    await plane.ready(1)
    written: list[bytes] = []
    done = await answer(plane.pool, question(), Relay(written.append))

    assert (done.prompt_tokens, done.completion_tokens) == (8, 16)
    assert (b"".join(written) + done.data).count(b"data: ") == 16


async def test_steps_that_come_fast_share_frames(plane: Plane) -> None:
    """Each has one delta of a stream; no token is lost by it, or out of order."""
    worker = plane.add()
    client = worker.context.socket(zmq.DEALER)
    OURS.apply(client)
    client.connect(worker.card.address)
    for stream in (7, 8):
        asked = wire.Generate(stream, wire.Leg.WHOLE, "r", wire.pack([20, 21, 22]), b"", b"{}", 500, RENDER)
        client.send(wire.encode(asked))
    frames: list[wire.Step] = []
    async with asyncio.timeout(20):
        while sum(len(frame.ends) for frame in frames) < 2:
            if await asyncio.to_thread(client.poll, 100):
                message = wire.decode_to_frontend(client.recv())
                frames += [message] if isinstance(message, wire.Step) else []
    client.close(0)

    for stream in (7, 8):
        ids = b"".join(delta.ids for frame in frames for delta in frame.deltas if delta.stream == stream)
        (last,) = [end for frame in frames for end in frame.ends if end.stream == stream]
        assert wire.unpack(ids + last.ids) == ([20, 21, 22] * 167)[:500]
    assert len(frames) < 400
    assert all(len({delta.stream for delta in frame.deltas}) == len(frame.deltas) for frame in frames)


async def test_a_worker_lost_before_the_first_byte_costs_another_attempt(plane: Plane) -> None:
    """On the other worker; the client sees nothing of it."""
    first = plane.add(interval_s=60)
    plane.add()
    await plane.ready(2)
    task = asyncio.create_task(answer(plane.pool, question(), Relay(lambda data: None)))
    await first.busy()
    first.die()
    done = await asyncio.wait_for(task, 5)

    assert done.completion_tokens == 16
    assert plane.legs == [Kind.AGGREGATED] * 2


async def test_a_worker_lost_in_mid_stream_is_followed_by_another(plane: Plane) -> None:
    """Within a second and not after the stall timeout; no token is lost, none repeated, and each is counted once."""
    first = plane.add(interval_s=0.02)
    second = plane.add(interval_s=0.0)
    await plane.ready(2)
    written: list[bytes] = []
    moments: list[float] = []

    def write(data: bytes) -> None:
        written.append(data)
        moments.append(time.monotonic())

    asked = question(tokens=7, max_tokens=60)
    alone = [data async for data in pieces(second, asked)]
    task = asyncio.create_task(answer(plane.pool, asked, Relay(write)))
    while len(written) < 10:
        await asyncio.sleep(0.01)
    first.die()
    done = await asyncio.wait_for(task, 5)

    assert b"".join(written) + done.data == b"".join(alone)
    assert (done.prompt_tokens, done.completion_tokens) == (7, 60)
    assert max(after - before for before, after in itertools.pairwise(moments)) < 1.0


async def pieces(worker: Worker, asked: Question) -> AsyncIterator[bytes]:
    """What one undisturbed worker writes for a question."""
    choice = Choice(asked.render, asked.tokens)
    ask = Ask(request_id="alone", prompt=wire.unpack(asked.prompt), render=asked.render, max_tokens=asked.max_tokens)
    async for piece in worker.engine.generate(ask):
        yield choice.end(piece) if piece.finish else choice.delta(piece)


async def test_a_stream_that_nobody_can_go_on_with_ends_with_an_error_at_once(plane: Plane) -> None:
    """503, within a second and not after the stall timeout: the connection says it."""
    worker = plane.add(interval_s=0.02)
    await plane.ready(1)
    written: list[bytes] = []
    task = asyncio.create_task(answer(plane.pool, question(max_tokens=1000), Relay(written.append)))
    while not written:
        await asyncio.sleep(0.01)
    worker.die()
    lost = time.monotonic()
    with pytest.raises(ApiError, match="no aggregated worker is ready") as error:
        await task

    assert error.value.status == 503
    assert time.monotonic() - lost < 1.0


async def test_a_silent_worker_leaves_the_routing_and_comes_back(plane: Plane) -> None:
    """After the stall timeout; its streams are given up, and cancelled at the worker."""
    worker = plane.add(interval_s=60)
    await plane.ready(1)
    task = asyncio.create_task(answer(plane.pool, question(), Relay(lambda data: None)))
    await worker.busy()
    announce = worker.server.announce
    worker.server.announce = lambda: None  # type: ignore[method-assign]  # stands for SIGSTOP, which would stop us too
    await plane.ready(0)
    with pytest.raises(ApiError, match="lost|no aggregated worker is ready"):
        await task
    worker.server.announce = announce  # type: ignore[method-assign]
    await plane.ready(1)

    async with asyncio.timeout(5):
        while worker.server.streams:
            await asyncio.sleep(0.01)


async def test_a_cancelled_request_ends_at_the_worker(plane: Plane) -> None:
    """Within a second."""
    worker = plane.add(interval_s=60)
    await plane.ready(1)
    task = asyncio.create_task(answer(plane.pool, question(), Relay(lambda data: None)))
    await worker.busy()
    task.cancel()
    async with asyncio.timeout(1):
        while worker.server.streams:
            await asyncio.sleep(0.01)

    assert next(iter(plane.links)).in_flight(-1) == 0


async def test_a_prefill_cancelled_before_it_began_leaves_no_stream(plane: Plane) -> None:
    """Request and cancellation arrive together, and the worker's task never runs: the last word comes all the same."""
    plane.add(Kind.PREFILL)
    plane.add(Kind.DECODE)
    await plane.ready(2)
    link = next(item for item in plane.links if item.card.kind is Kind.PREFILL)
    unwanted = Releaser(plane.pool, question())
    for _ in range(20):
        number = link.open(lambda stream: generate(stream, wire.Leg.PREFILL), unwanted)
        assert number is not None
        link.cancel(number, unwanted)
    async with asyncio.timeout(2):
        while link.in_flight(-1):
            await asyncio.sleep(0.01)


async def test_a_draining_worker_gets_nothing_new_and_finishes_what_runs(plane: Plane) -> None:
    """A request that crosses its word is tried elsewhere."""
    leaving = plane.add(interval_s=0.02)
    plane.add()
    await plane.ready(2)
    running = asyncio.create_task(answer(plane.pool, question(max_tokens=20), Relay(lambda data: None)))
    await leaving.busy()
    drained = asyncio.create_task(leaving.server.drain(10))
    others = [await answer(plane.pool, question(), Relay(lambda data: None)) for _ in range(4)]
    await drained

    assert (await running).completion_tokens == 20
    assert [item.completion_tokens for item in others] == [16] * 4


async def test_a_worker_gives_back_what_it_cannot_serve(plane: Plane) -> None:
    """As when its engine has died: told at once, served by another worker, and counted as lost."""
    sick = plane.add(interval_s=60)
    plane.add()
    await plane.ready(2)
    task = asyncio.create_task(answer(plane.pool, question(), Relay(lambda data: None)))
    await sick.busy()
    sick.server.give_back(wire.Failed(0, 503, "the engine has died", True))
    done = await asyncio.wait_for(task, 2)

    assert done.completion_tokens == 16
    assert (sick.server.outcomes.lost, sick.server.outcomes.cancelled) == (1, 0)


async def test_a_restarted_worker_has_one_link(plane: Plane) -> None:
    """The old link meets the new process at the old port, and stays out."""
    old = plane.add()
    await plane.ready(1)
    old.die()
    plane.workers.clear()
    fresh = Worker(Kind.AGGREGATED, plane._base, "again", plane._model, 0.0)
    plane.workers.append(fresh)
    plane.links.update({fresh.card.member: fresh.card})
    await plane.ready(1)
    await asyncio.sleep(1.0)

    assert [link.card.instance for link in plane.links if link.usable] == ["again"]
    async with asyncio.timeout(10):
        while len(list(plane.links)) > 1:
            await asyncio.sleep(0.05)


async def test_a_disaggregated_answer_takes_two_legs(plane: Plane) -> None:
    """Prefill, then decode with what it returned."""
    plane.pool.disaggregated = True
    plane.add(Kind.PREFILL)
    plane.add(Kind.DECODE)
    await plane.ready(2)
    done = await answer(plane.pool, question(tokens=100), Relay(lambda data: None))

    assert plane.legs == [Kind.PREFILL, Kind.DECODE]
    assert done.prompt_tokens == 100


async def test_the_lease_runs_while_a_prefill_worker_stands_still(plane: Plane) -> None:
    """What its engine was done with long before it could say so is computed again, and not pulled."""
    plane.pool.disaggregated = True
    prefill = plane.add(Kind.PREFILL)
    plane.add(Kind.DECODE)
    await plane.ready(2)
    serve, late = prefill.engine.generate, [prefill.engine.sizes.lease_s]

    async def generate(ask: Ask) -> AsyncIterator[Piece]:
        async for piece in serve(ask):
            piece.made_at -= late.pop() if late else 0.0
            yield piece

    prefill.engine.generate = generate  # type: ignore[method-assign]
    done = await answer(plane.pool, question(tokens=100), Relay(lambda data: None))

    assert plane.legs == [Kind.PREFILL, Kind.PREFILL, Kind.DECODE]
    assert done.prompt_tokens == 100


async def test_a_decode_refuses_a_prefill_past_its_date(plane: Plane) -> None:
    """It would bring another prompt's tokens; refused before the engine sees it, for another attempt."""
    plane.add(Kind.DECODE)
    await plane.ready(1)
    link = next(iter(plane.links))
    last: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    class Sink:
        def feed(self, ids: bytes, data: bytes) -> None:
            raise AssertionError("nothing may be produced")

        def end(self, word: Any) -> None:
            last.set_result(word)

    engine = plane.workers[0].engine
    parameters = engine._transfer(wire_ask(40))
    late = time.time() - 1
    link.open(
        lambda stream: generate(stream, wire.Leg.DECODE, transfer=transfer.pack(parameters), expires_at=late), Sink()
    )
    word = await asyncio.wait_for(last, 5)

    assert isinstance(word, wire.Failed)
    assert word.retryable
    assert "expired" in word.message


async def test_noise_is_dropped_and_the_worker_lives_on(plane: Plane) -> None:
    """Bytes that are no message of ours end nothing."""
    plane.add()
    await plane.ready(1)
    link = next(iter(plane.links))
    for noise in (b"", b"\xc1", b"\x93\x01", os.urandom(200)):
        link._socket.send([noise])
    done = await answer(plane.pool, question(), Relay(lambda data: None))

    assert done.completion_tokens == 16


@pytest.mark.parametrize(
    ("keys", "comes_in"),
    [
        pytest.param(OURS, True, id="a frontend of ours"),
        pytest.param(ClientKeys(WORKER[0], *STRANGER), False, id="a stranger who knows the server's public key"),
        pytest.param(ClientKeys(STRANGER[0], *FRONTEND), False, id="a frontend of ours that takes it for another"),
        pytest.param(None, False, id="a stranger without any key"),
    ],
)
async def test_a_worker_talks_to_frontends_of_its_own_deployment_alone(
    plane: Plane, keys: ClientKeys | None, comes_in: bool
) -> None:
    """Whoever asks, it is the key that lets him in, and each side checks the other's."""
    address = plane.add().card.address
    await plane.ready(1)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        if keys:
            keys.apply(socket)
        socket.connect(address)
        socket.send(wire.encode(wire.Ping()))
        async with asyncio.timeout(5):
            said = await asyncio.to_thread(socket.poll, 1000)

    assert bool(said) is comes_in


async def test_a_door_that_is_closed_lets_nobody_in(plane: Plane) -> None:
    """As if it had been forgotten: libzmq's own default would be to let in everybody."""
    worker = plane.add()
    await plane.ready(1)
    assert worker.server._door
    worker.server._door.close()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        OURS.apply(socket)
        socket.connect(worker.card.address)
        socket.send(wire.encode(wire.Ping()))
        assert not await asyncio.to_thread(socket.poll, 1000)


async def test_a_busy_worker_gets_nothing_while_another_one_is_not(plane: Plane) -> None:
    """Whatever the mode says; when all are busy it decides among all, and a client that names a worker gets that one."""
    pool = plane.pool = Pool(plane.links, in_turns(direct=True), False, plane.legs.append)
    for _ in range(3):
        plane.add()
    await plane.ready(3)
    busy = {"w0", "w2"}
    pool.busy = lambda link: link.card.instance in busy

    def picked(wanted: Wishes) -> set[str]:
        asked = replace(question(), wishes=wanted)
        return {pool.pick(Kind.AGGREGATED, asked, ()).link.card.instance for _ in range(6)}

    assert picked(Wishes()) == {"w1"}
    assert picked(Wishes(members=(plane.workers[2].card.member,))) == {"w2"}
    busy.add("w1")
    assert picked(Wishes()) == {"w0", "w1", "w2"}


async def test_short_prompts_are_computed_where_they_are_answered(plane: Plane) -> None:
    """By the policy of the recipe, and whenever no prefill worker is left; each time is counted with its reason."""
    reasons: list[Reason] = []
    plane.pool = Pool(
        plane.links,
        in_turns(),
        disaggregated=True,
        on_leg=plane.legs.append,
        local=LocalPrefill(mode=LocalPrefillMode.SHORT, short_tokens=10),
        on_local=reasons.append,
    )
    prefill = plane.add(Kind.PREFILL)
    plane.add(Kind.DECODE)
    await plane.ready(2)
    for tokens in (10, 11):
        await answer(plane.pool, question(tokens), Relay(lambda data: None))
    prefill.die()
    await plane.ready(1)
    await answer(plane.pool, question(11), Relay(lambda data: None))

    assert plane.legs == [Kind.DECODE, Kind.PREFILL, Kind.DECODE, Kind.DECODE]
    assert reasons == [Reason.SHORT, Reason.NO_PREFILL]


async def test_a_decode_that_waits_for_a_lost_prefill_worker_is_begun_anew(plane: Plane) -> None:
    """An engine waits for ever for a peer that hangs; the frontend knows that it does."""
    plane.pool.disaggregated = True
    first = plane.add(Kind.PREFILL)
    plane.add(Kind.PREFILL)
    decode = plane.add(Kind.DECODE, interval_s=3.0)
    await plane.ready(3)
    task = asyncio.create_task(answer(plane.pool, question(), Relay(lambda data: None)))
    await decode.busy()
    first.die()
    async with asyncio.timeout(2):
        while plane.legs != [Kind.PREFILL, Kind.DECODE] * 2:
            await asyncio.sleep(0.01)
    task.cancel()


async def test_every_data_parallel_rank_gets_its_share(plane: Plane) -> None:
    """Each rank is a candidate of its own; a client may name one."""
    worker = plane.add(interval_s=60)
    worker.card = msgspec.structs.replace(worker.card, dp_first=2, dp_count=2)
    plane.links.update({worker.card.member: worker.card})
    await plane.ready(1)
    tasks = [asyncio.create_task(answer(plane.pool, question(), Relay(lambda data: None))) for _ in range(4)]
    async with asyncio.timeout(5):
        while worker.server.streams < 4:
            await asyncio.sleep(0.01)
    link = next(iter(plane.links))

    assert [link.in_flight(rank) for rank in (2, 3)] == [2, 2]
    with pytest.raises(ApiError, match="no aggregated worker with data-parallel rank 4 is ready"):
        await answer(plane.pool, replace(question(), dp_rank=4), Relay(lambda data: None))
    for task in tasks:
        task.cancel()


async def test_an_adapter_is_asked_for_where_it_is_loaded(plane: Plane) -> None:
    """And nowhere else; a card that changes is believed."""
    plane.add()
    holder = plane.add()
    await plane.ready(2)
    asked = replace(question(), adapter="poet")
    with pytest.raises(ApiError, match="no aggregated worker with the adapter 'poet' is ready"):
        await answer(plane.pool, asked, Relay(lambda data: None))
    holder.card = msgspec.structs.replace(holder.card, adapters=("poet",))
    plane.links.update({item.card.member: item.card for item in plane.workers})

    for _ in range(4):
        assert plane.pool.pick(Kind.AGGREGATED, asked, set()).link.card.instance == holder.card.instance


async def test_an_adapter_is_offered_once_every_kind_of_worker_has_it(plane: Plane) -> None:
    """A prompt that is computed with it is worth nothing to a decode worker without."""
    plane.pool = Pool(plane.links, in_turns(), True, plane.legs.append)
    offered = []
    workers = [plane.add(Kind.PREFILL), plane.add(Kind.DECODE)]
    await plane.ready(2)
    for worker in workers:
        offered.append(plane.pool.adapters)
        worker.card = msgspec.structs.replace(worker.card, adapters=("poet",))
        plane.links.update({item.card.member: item.card for item in plane.workers})

    assert [*offered, plane.pool.adapters] == [[], [], ["poet"]]


async def test_only_alike_engines_are_paired(plane: Plane) -> None:
    """A KV cache of another model, version or block size would be read as if it were one's own."""
    for kind, fingerprint in ((Kind.PREFILL, "a"), (Kind.DECODE, "b")):
        worker = plane.add(kind)
        worker.card = msgspec.structs.replace(worker.card, fingerprint=fingerprint)
    plane.links.update({item.card.member: item.card for item in plane.workers})
    await plane.ready(2)
    with pytest.raises(ApiError, match="no decode worker is ready"):
        plane.pool.pick(Kind.DECODE, question(), set(), "a")


def generate(stream: int, leg: wire.Leg, **more: Any) -> wire.Generate:
    """A leg of a request with a prompt of 40 tokens."""
    return wire.Generate(stream, leg, "r", wire.pack(range(40)), b"", b"{}", 16, RENDER, **more)


def wire_ask(tokens: int) -> Ask:
    """A prefill as the engine is asked for it."""
    return Ask(request_id="r", prompt=list(range(tokens)), render=RENDER, prefill_only=True)
