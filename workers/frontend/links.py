"""The frontend's side of the request plane: one link to each worker, and who is alive.

etcd says where a worker is; the link says whether it serves. A link is usable while it is connected, its worker is heard
and says that it serves. A worker that etcd no longer lists stays usable for as long as it is heard (etcd may have lost its
data); it is forgotten once it is both unlisted and silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from workers.runtime import wire
from workers.runtime.awake import AwakeClock
from workers.runtime.curve import ClientKeys
from workers.runtime.registry import Card
from workers.runtime.sockets import LoopSocket

log = logging.getLogger(__name__)

PING_S = 1.0
CHECK_S = 0.25
SETTLE_S = 0.005
LOAD_VALID_S = 3.0
LOST = wire.Failed(0, 503, "the worker was lost", True)


class Sink(Protocol):
    """Where what a worker says of one stream goes."""

    def feed(self, ids: bytes, data: bytes) -> None:
        """New token ids, and bytes for the client."""
        ...

    def end(self, last: wire.LastWord) -> None:
        """The last word on the stream."""
        ...


class Link:
    """The connection to one instance of a worker."""

    def __init__(
        self,
        card: Card,
        context: zmq.Context[Any],
        keys: ClientKeys,
        stall_timeout_s: float,
        clock: AwakeClock,
        on_change: Callable[[], None],
    ) -> None:
        self.card = card
        self.listed = True
        self._waiting = (0, 0.0)
        self._kv_usage = 0.0
        self._session = 0
        self._streams: dict[int, Sink] = {}
        self._costs: dict[int, tuple[int, int]] = {}
        self._running: Counter[int] = Counter()
        self._watchers: list[Callable[[], None]] = []
        self.prefilling = 0
        """Prompt tokens of this frontend's requests that the worker has yet to compute, as far as is known here."""
        self._numbers = itertools.count(1)
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._on_change = on_change
        self._connected = False
        self._serving = False
        self._heard = clock.now - stall_timeout_s
        self._socket = self._connect(context, keys)
        self._monitor = self._watch()
        self._socket.raw.connect(card.address)

    @property
    def usable(self) -> bool:
        """Whether new requests may go to the worker."""
        return self._connected and self._serving and not self.silent

    @property
    def silent(self) -> bool:
        """Whether nothing was heard for the stall timeout."""
        return self._clock.now - self._heard >= self._stall_timeout_s

    @property
    def settled(self) -> bool:
        """Whether the worker has said once whether it serves."""
        return self._session > 0

    def in_flight(self, rank: int) -> int:
        """Streams of this frontend that a data-parallel rank of the worker is serving; -1 counts those of all ranks."""
        return len(self._streams) if rank < 0 else self._running[rank]

    @property
    def waiting(self) -> int:
        """Requests that the engine has queued, of all frontends; 0 when no report came lately."""
        number, reported = self._waiting
        return number if time.monotonic() - reported < LOAD_VALID_S else 0

    @property
    def kv_usage(self) -> float:
        """Share of the worker's KV blocks in use, 0 to 1; 0 when no report came lately."""
        return self._kv_usage if time.monotonic() - self._waiting[1] < LOAD_VALID_S else 0.0

    def report(self, waiting: int, kv_usage: float = 0.0) -> None:
        """Keep what the worker reported of its load."""
        self._waiting = (waiting, time.monotonic())
        self._kv_usage = kv_usage

    def open(
        self, build: Callable[[int], wire.Generate | wire.Call], sink: Sink, rank: int = -1, tokens: int = 0
    ) -> int | None:
        """Send a request for a new stream, whose number `build` is given; what comes back goes to the sink.

        Args:
            build: Makes the message.
            sink: Gets what the worker says.
            rank: The data-parallel rank that it is for; -1 for any.
            tokens: Prompt tokens that the worker computes before it answers.

        Returns the number, or None when the request could not be sent.
        """
        number = next(self._numbers)
        message = wire.encode(build(number))
        if not self._socket.send([message]):
            return None
        self._streams[number] = sink
        self._costs[number] = (rank, tokens)
        self._running[rank] += 1
        self.prefilling += tokens
        return number

    def begun(self, number: int) -> None:
        """The stream's prompt is computed: it no longer counts as work that others wait for."""
        if number in self._costs:
            rank, tokens = self._costs[number]
            self.prefilling -= tokens
            self._costs[number] = (rank, 0)

    @contextlib.contextmanager
    def watched(self, on_lost: Callable[[], None]) -> Iterator[None]:
        """Call `on_lost` if the worker is lost within the block."""
        self._watchers.append(on_lost)
        try:
            yield
        finally:
            self._watchers.remove(on_lost)

    def cancel(self, number: int, last: Sink | None = None) -> None:
        """Nobody waits for a stream any more; does nothing if it has ended. `last` still gets its last word."""
        if self._forget(number):
            if last is not None:
                self._streams[number] = last
            self._socket.send([wire.encode(wire.Cancel(number))])

    def release(self, request_id: str, transfer: bytes) -> None:
        """Ask a decode worker to free what a prefill worker holds for a decode that will not come."""
        self._socket.send([wire.encode(wire.Release(request_id, transfer))])

    def ping(self) -> None:
        """Tell the worker that this frontend lives."""
        self._socket.send([wire.encode(wire.Ping())])

    def lose(self, why: str, failed: wire.Failed = LOST) -> None:
        """Give up all streams: the worker is gone or is not heard.

        They are cancelled there too: a worker that was only frozen would go on with them for nobody, and a decode among
        them would pull blocks whose lease has ended.
        """
        if self._streams:
            log.warning("%s %s with %d requests running", self.card.member, why, len(self._streams))
        for number in list(self._streams):
            self._socket.send([wire.encode(wire.Cancel(number))])
            self._end(number, failed)
        for on_lost in list(self._watchers):
            on_lost()

    def close(self) -> None:
        """End the link and its streams."""
        self.lose("left")
        self._monitor.close()
        self._socket.close()

    def _connect(self, context: zmq.Context[Any], keys: ClientKeys) -> LoopSocket:
        socket = LoopSocket(context, zmq.DEALER, self._on_message)
        keys.apply(socket.raw)
        # Frames must not queue for a worker that is not there: a request is then better sent elsewhere.
        socket.raw.setsockopt(zmq.IMMEDIATE, 1)
        socket.raw.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.raw.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        return socket

    def _watch(self) -> LoopSocket:
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        address = f"inproc://monitor-{id(self)}"
        self._socket.raw.monitor(address, events)
        monitor = LoopSocket(self._socket.raw.context, zmq.PAIR, self._on_event)
        monitor.raw.connect(address)
        return monitor

    def _on_event(self, parts: list[bytes]) -> None:
        event = parse_monitor_message(parts)["event"]
        self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if self._connected:
            self.ping()
        else:
            self._serving = False
            self.lose("disconnected")
        self._on_change()

    def _on_message(self, parts: list[bytes]) -> None:
        try:
            message = wire.decode_to_frontend(parts[-1])
        except msgspec.DecodeError:
            log.warning("dropped a message of %d bytes from %s that is none of ours", len(parts[-1]), self.card.member)
            return
        if isinstance(message, wire.Beat):
            self._beat(message)
            return
        self._heard = self._clock.now
        streams = self._streams
        for delta in message.deltas:
            sink = streams.get(delta.stream)
            if sink is not None:
                sink.feed(delta.ids, delta.data)
        words: tuple[wire.LastWord, ...] = (*message.ends, *message.prefilled, *message.failed, *message.called)
        for last in words:
            self._end(last.stream, last)

    def _beat(self, beat: wire.Beat) -> None:
        serving = beat.serving
        if beat.instance != self.card.instance:
            # A restarted worker took the port: it has a card, and gets a link, of its own.
            self.lose("was replaced")
            self._heard, serving = self._clock.now - self._stall_timeout_s, False
        else:
            self._heard = self._clock.now
            if beat.session != self._session and self._session:
                self.lose("has forgotten this frontend")
            self._session = beat.session
        if serving != self._serving:
            self._serving = serving
            self._on_change()

    def _end(self, number: int, last: wire.LastWord) -> None:
        sink = self._forget(number)
        if sink is not None:
            sink.end(last)

    def _forget(self, number: int) -> Sink | None:
        sink = self._streams.pop(number, None)
        rank, tokens = self._costs.pop(number, (None, 0))
        if rank is not None:
            self._running[rank] -= 1
            self.prefilling -= tokens
        return sink


class Links:
    """All links of a frontend."""

    def __init__(self, keys: ClientKeys, stall_timeout_s: float, on_change: Callable[[], None]) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._keys = keys
        self._stall_timeout_s = stall_timeout_s
        self._clock = AwakeClock()
        self._on_change = on_change
        self._links: dict[str, Link] = {}
        self._told = asyncio.Event()

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links.values()))

    def update(self, cards: dict[str, Card]) -> None:
        """Follow what etcd lists: connect to new instances, mark those that are no longer listed."""
        listed = {card.instance: card for card in cards.values()}
        for instance, card in listed.items():
            link = self._links.get(instance)
            if link is not None:
                link.card = card  # the same worker may say more of itself than before: adapters, for one
                continue
            self._links[instance] = Link(
                card, self._context, self._keys, self._stall_timeout_s, self._clock, self._on_change
            )
        for instance, link in self._links.items():
            link.listed = instance in listed
        self._told.set()
        self._on_change()

    async def settle(self, timeout_s: float) -> None:
        """Return once it is known which workers there are and whether each of them serves, or when the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._told.wait()
                while not all(link.settled for link in self._links.values() if link.listed):  # noqa: ASYNC110  # once in a life
                    await asyncio.sleep(SETTLE_S)

    def by_member(self, member: str) -> Link | None:
        """The link to the member's present instance."""
        found = [link for link in self._links.values() if link.card.member == member and link.listed]
        return found[-1] if found else None

    async def keep(self) -> None:
        """Ping every worker, give up the streams of those that fell silent, forget the ones that are gone; for ever."""
        for tick in itertools.count():
            paused_s = self._clock.tick()
            if paused_s > 1:
                log.warning("this process was held up for %.1f s", paused_s)
            for instance, link in list(self._links.items()):
                if tick % round(PING_S / CHECK_S) == 0:
                    link.ping()
                if link.silent:
                    link.lose("is not heard")
                    if not link.listed:
                        link.close()
                        del self._links[instance]
                        self._on_change()
            await asyncio.sleep(CHECK_S)

    def abort(self, why: str) -> None:
        """End every stream with an error that is not tried again."""
        for link in self._links.values():
            link.lose(why, wire.Failed(0, 503, why, False))

    def close(self) -> None:
        """End all links."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._context.destroy(linger=0)
