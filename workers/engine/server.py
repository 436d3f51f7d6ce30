"""The worker's side of the request plane: requests in, one frame of results for each frontend and engine step out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Coroutine
from typing import Any

import msgspec
import zmq
from prometheus_client import CollectorRegistry, Gauge

from workers.engine import transfer
from workers.engine.base import Ask, Engine, LostError, PeerLostError, RefusedError, UnbegunError
from workers.engine.metrics import Outcomes
from workers.engine.shapes import writer
from workers.runtime import wire
from workers.runtime.awake import AwakeClock
from workers.runtime.curve import Door, ServerKeys
from workers.runtime.sockets import LoopSocket

log = logging.getLogger(__name__)

BEAT_S = 0.5
FRONTEND_SILENT_S = 10.0
ABORT_S = 1.0
# Sending a frame and reading it costs about 0.1 ms of CPU however little it carries: a millisecond lies between those that can
# wait.
FRAME_GAP_S = 0.001
CANCELLED = wire.Failed(0, 503, "the request was cancelled", False)
STOPPING = wire.Failed(0, 503, "the worker is stopping", True)
StreamKey = tuple[bytes, int]


class RequestServer:
    """Serves one engine to any number of frontends; everything happens in one loop."""

    def __init__(self, engine: Engine, instance: str, registry: CollectorRegistry) -> None:
        self._engine = engine
        self._instance = instance
        self._loop: asyncio.AbstractEventLoop
        self._socket: LoopSocket | None = None
        self._door: Door | None = None
        self._tasks: dict[StreamKey, asyncio.Task[None]] = {}
        self._steps: dict[bytes, wire.Step] = {}
        self._next_flush = 0.0
        self._urgent = False
        self._clock = AwakeClock()
        self._heard: dict[bytes, float] = {}
        self._sessions: dict[bytes, int] = {}
        self._session = itertools.count(1)
        self._unnamed = itertools.count(-1, -1)  # work that no stream of a frontend stands for
        self.serving = True
        self.outcomes = Outcomes()
        streams = Gauge("baton_worker_streams", "Requests that are being served.", registry=registry)
        streams.set_function(lambda: len(self._tasks))

    def bind(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: ServerKeys) -> None:
        """Listen at `tcp://...` for the frontends that the keys name; a context has one server."""
        self._loop = asyncio.get_running_loop()
        self._door = Door(context, keys.clients)
        socket = LoopSocket(context, zmq.ROUTER, self._on_message)
        socket.raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
        keys.apply(socket.raw)
        socket.raw.bind(address)
        self._socket = socket

    @property
    def streams(self) -> int:
        """Requests that are being served."""
        return len(self._tasks)

    async def beat(self) -> None:
        """Tell every frontend, twice a second, that we live; forget those that fell silent."""
        while True:
            self._clock.tick()
            self.announce()
            now = self._clock.now
            for identity in [who for who, when in self._heard.items() if now - when > FRONTEND_SILENT_S]:
                self._forget(identity)
            await asyncio.sleep(BEAT_S)

    def announce(self) -> None:
        """Send the beat now."""
        progress = self._engine.load.progress
        for identity, session in list(self._sessions.items()):
            self._send(identity, wire.encode(wire.Beat(self._instance, session, self.serving, progress)))

    def withdraw(self) -> None:
        """Take nothing new: frontends learn it at once, and a request that is on its way is given back."""
        self.serving = False
        self.announce()

    def admit(self) -> None:
        """Take requests again."""
        self.serving = True
        self.announce()

    async def finish(self, timeout_s: float) -> int:
        """Let what runs finish, and give back what has not by then; returns how many that were."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        late = list(self._tasks.values())
        self.give_back(STOPPING)
        if late:
            await asyncio.wait(late, timeout=ABORT_S)
        return len(late)

    def give_back(self, why: wire.Failed) -> None:
        """End every stream with this word, at once; a frontend that is told `retryable` tries it on another worker."""
        for key, task in list(self._tasks.items()):
            self._fail(key, why)
            task.cancel()
        self._flush()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new from frontends that listen, let what runs finish, and give back what has not by then."""
        self.withdraw()
        await self.finish(timeout_s)

    def close(self) -> None:
        """Stop listening; the last frames may still leave."""
        if self._socket:
            self._flush()  # what waits for its millisecond
            self._socket.close(linger_ms=500)
            self._socket = None
        if self._door:
            self._door.close()

    def _on_message(self, parts: list[bytes]) -> None:
        identity, payload = parts[0], parts[-1]
        try:
            message = wire.decode_to_worker(payload)
        except msgspec.DecodeError:
            log.warning("dropped a message of %d bytes that is none of ours", len(payload))
            return
        self._heard[identity] = self._clock.now
        if identity not in self._sessions:
            self._sessions[identity] = next(self._session)
            self.announce()
        if isinstance(message, wire.Generate | wire.Call) and not self.serving:
            self._fail((identity, message.stream), STOPPING)
        elif isinstance(message, wire.Generate | wire.Call):
            self._track((identity, message.stream), self._serve((identity, message.stream), message))
        elif isinstance(message, wire.Cancel):
            self._cancel((identity, message.stream))
        elif isinstance(message, wire.Release):
            self._track((identity, next(self._unnamed)), self._release(message))

    def _cancel(self, key: StreamKey) -> None:
        """End a stream, and say so: of a prefill the frontend waits for the last word, which may be a result to release.

        Said here and not by the stream's task, which may not have begun and then never runs.
        """
        task = self._tasks.get(key)
        if task:
            task.cancel()
            self._fail(key, CANCELLED)

    def _track(self, key: StreamKey, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def _serve(self, key: StreamKey, request: wire.Generate | wire.Call) -> None:
        try:
            if isinstance(request, wire.Call):
                await self._call(key, request)
            elif request.leg is wire.Leg.ENCODE:
                await self._encode(key, request)
            elif request.leg is wire.Leg.PREFILL:
                await self._prefill(key, request)
            else:
                await self._answer(key, request)
        except RefusedError as error:
            self._fail(key, wire.Failed(0, error.status, str(error), False, error.param))
        except (LostError, transfer.TransferError) as error:
            self._fail(key, wire.Failed(0, 503, str(error), True, source_lost=isinstance(error, PeerLostError)))
        except Exception as error:
            log.exception("request %s failed", request.request_id)
            self._fail(key, wire.Failed(0, 500, f"{type(error).__name__}: {error}", False))

    async def _call(self, key: StreamKey, request: wire.Call) -> None:
        def say(data: bytes) -> None:
            self._step(key[0]).deltas.append(wire.Delta(key[1], b"", data))

        answered = await self._engine.call(request.request_id, request.route, request.body, say)
        self._step(key[0]).called.append(
            wire.Called(key[1], answered.status, answered.body, answered.content_type, answered.prompt_tokens)
        )

    async def _encode(self, key: StreamKey, request: wire.Generate) -> None:
        ask = await self._rendered(_ask(request, encode_only=True))
        async for piece in self._engine.generate(ask):
            if piece.finish:
                self._step(key[0]).prefilled.append(
                    wire.Prefilled(key[1], b"", 0.0, len(ask.prompt), 0, wire.pack(ask.prompt), ask.features)
                )

    async def _prefill(self, key: StreamKey, request: wire.Generate) -> None:
        ask = await self._rendered(_ask(request, prefill_only=True))
        async for piece in self._engine.generate(ask):
            if piece.finish:
                if piece.transfer is None:
                    raise LostError("the prefill engine returned no transfer parameters")
                # This process may have stood still since: the engine core's lease has not.
                left_s = self._engine.sizes.lease_s - (time.monotonic() - piece.made_at) - transfer.MARGIN_S
                expires_at = time.time() + left_s
                tokens = len(ask.prompt) + len(ask.produced)
                prefilled = wire.Prefilled(
                    key[1], transfer.pack(piece.transfer), expires_at, tokens, piece.cached_tokens
                )
                if request.source or request.features:  # made here or by an encoder, and the decode leg needs it too
                    prefilled.prompt, prefilled.features = wire.pack(ask.prompt), ask.features
                self._step(key[0]).prefilled.append(prefilled)

    async def _rendered(self, ask: Ask) -> Ask:
        return await self._engine.rendered(ask) if ask.source or ask.features else ask

    async def _answer(self, key: StreamKey, request: wire.Generate) -> None:
        pulls = request.leg is wire.Leg.DECODE
        if pulls and time.time() > request.expires_at:
            raise transfer.TransferError("the prefill expired before its decode began, or the nodes' clocks differ")
        try:
            ask = await self._rendered(_ask(request, transfer=request.transfer if pulls else None))
            await self._stream(key, request, ask)
        except (RefusedError, UnbegunError):
            if pulls:  # the decode engine will not pull: the prefill engine need not wait for it
                await self._release(wire.Release(f"{request.request_id}-release", request.transfer))
            raise

    async def _stream(self, key: StreamKey, request: wire.Generate, ask: Ask) -> None:
        """Pass on what the engine produces, rendered."""
        identity, stream = key
        produced, prompt_tokens = len(ask.produced), len(ask.prompt)
        choice = writer(request.render, prompt_tokens, produced, request.cached_tokens)
        pack, render, steps = wire.pack_few, choice.delta, self._steps
        filled, delta, first = wire.Step(), wire.Delta(stream, b"", b""), True
        async for piece in self._engine.generate(ask):
            ids = pack(piece.ids)
            produced += len(piece.ids)
            if piece.finish is None:  # this is what a worker does for every token
                if steps.get(identity) is filled:  # it has not left since the last token
                    delta.ids += ids
                    delta.data += render(piece)
                    continue
                delta = wire.Delta(stream, ids, render(piece))
                filled, first = self._step(identity, first), False
                filled.deltas.append(delta)
                continue
            self._step(identity, first).ends.append(
                wire.End(
                    stream=stream,
                    reason=piece.finish,
                    ids=ids,
                    data=choice.end(piece),
                    prompt_tokens=prompt_tokens,
                    completion_tokens=produced,
                    cached_tokens=piece.cached_tokens,
                    reasoning_tokens=piece.reasoning_tokens,
                    extra=piece.extra,
                )
            )

    def _fail(self, key: StreamKey, failed: wire.Failed) -> None:
        self.outcomes.note(failed.status, failed.retryable, failed is CANCELLED)
        self._step(key[0]).failed.append(msgspec.structs.replace(failed, stream=key[1]))

    async def _release(self, message: wire.Release) -> None:
        """Free a prefill's blocks; when that fails they are freed by the end of their lease."""
        try:
            pull = transfer.unpack(message.transfer, transfer.tokens(message.transfer), self._engine.sizes.block_size)
            await self._engine.release(message.request_id, pull)
        except (transfer.TransferError, LostError) as error:
            log.warning("could not release the blocks of %s: %s", message.request_id, error)

    def _step(self, identity: bytes, at_once: bool = True) -> wire.Step:
        """The frame that is being filled for a frontend.

        It leaves once the streams of this engine step have run. If steps come faster than frames may, it takes along what the
        next ones bring, unless it has something that leaves `at_once`: the first token of a stream waits for nobody. Nor does
        a stream that is alone.
        """
        step = self._steps.get(identity)
        if step is not None and self._urgent:  # all streams of an engine step but the first
            return step
        # Not get_running_loop, which asks the kernel for the process's number each time.
        loop = self._loop
        at_once = at_once or len(self._tasks) == 1
        if not self._urgent and (at_once or (not self._steps and loop.time() >= self._next_flush)):
            self._urgent = True
            loop.call_soon(self._flush)
        elif not self._steps:
            loop.call_at(self._next_flush, self._flush)
        if step is None:
            step = self._steps[identity] = wire.Step(deltas=[], ends=[], prefilled=[], failed=[], called=[])
        return step

    def _flush(self) -> None:
        if self._socket is None:
            return  # closed: whoever listens has been told by the connection's end
        self._urgent = False
        self._next_flush = self._loop.time() + FRAME_GAP_S
        steps = list(self._steps.items())
        self._steps.clear()
        for identity, step in steps:
            self._send(identity, wire.encode(step))

    def _send(self, identity: bytes, message: bytes) -> None:
        assert self._socket
        if not self._socket.send([identity, message]):
            log.warning("a frontend went away")
            self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        self._heard.pop(identity, None)
        self._sessions.pop(identity, None)
        for key, task in list(self._tasks.items()):
            if key[0] == identity:
                task.cancel()


def _ask(
    request: wire.Generate, prefill_only: bool = False, encode_only: bool = False, transfer: bytes | None = None
) -> Ask:
    return Ask(
        request_id=request.request_id,
        prompt=wire.unpack(request.prompt),
        produced=wire.unpack(request.produced),
        render=request.render,
        options=request.options,
        max_tokens=request.max_tokens,
        prefill_only=prefill_only,
        encode_only=encode_only,
        transfer=transfer,
        priority=request.priority,
        adapter=request.adapter,
        dp_rank=request.dp_rank,
        choice=request.choice,
        trace=request.trace,
        source=request.source,
        features=request.features,
    )
