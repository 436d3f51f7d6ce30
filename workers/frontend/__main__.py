"""A frontend process: `python -m workers.frontend RUN_DIR NAME`, started by the agent of a rank that may lead; without NAME, a
spare one.

It serves wherever it is; what only one process of a deployment may do, it does while its rank leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from launch.elastic import Following
from launch.errors import ConfigError, LaunchError
from launch.plan import FRONTEND_PORT, plan, shared_port
from launch.recipe import Kind, Recipe, RouterMode
from launch.records import STOPPING, Control, RunDirectory
from launch.standby import frontend_place
from slurm import shield
from slurm.children import report
from slurm.limit import told
from slurm.places import Place, places
from slurm.spare import wait_for_place
from workers.engine.options import merged, serving_options
from workers.frontend import tls
from workers.frontend.admin import Admin
from workers.frontend.admission import Gate, Thresholds
from workers.frontend.app import App
from workers.frontend.batches import Batches
from workers.frontend.book import Book
from workers.frontend.errors import ApiError, error_body
from workers.frontend.exchange import Pool
from workers.frontend.files import Drawer, Files
from workers.frontend.fleet import Fleet
from workers.frontend.http import Request, Server
from workers.frontend.known import Known
from workers.frontend.kv_metrics import KvMetrics
from workers.frontend.kv_plane import KvPlane
from workers.frontend.kv_router import KvRouter, Weights
from workers.frontend.kv_view import PREDICTED_S, KvView
from workers.frontend.limits import ConnectionLimits, raise_descriptor_limit
from workers.frontend.links import Link, Links
from workers.frontend.local import LocalPrefill
from workers.frontend.metrics import ByModel, Metrics
from workers.frontend.models import Models, Workers
from workers.frontend.reply import Kept
from workers.frontend.router import Router, mode
from workers.frontend.service import Served, Service
from workers.frontend.sources import worker_tokenizes
from workers.frontend.stored import Store
from workers.frontend.text import Text
from workers.frontend.trace import Tracer
from workers.runtime.collector import settle
from workers.runtime.commands import Commander
from workers.runtime.curve import ClientKeys
from workers.runtime.etcd import Etcd
from workers.runtime.events import LoadEvent, follow_load
from workers.runtime.keys import KeyRing
from workers.runtime.logs import set_up_logging
from workers.runtime.registry import Card, follow

log = logging.getLogger("workers.frontend")

FLUSH_S = 2.0
BATCHES = "batches"
KERNEL_SEND_BYTES = 256 << 10
SETTLE_S = 1.0
LEADS_S = 1.0
MOVED_S = 1.0


def main() -> int:
    """Serve until SIGTERM, then let what runs finish."""
    shield.hear()
    run, name = RunDirectory(Path(sys.argv[1])), sys.argv[2] if len(sys.argv) > 2 else wait_for_place()
    set_up_logging(name)
    recipe, job, control = run.recipe(), run.job(), run.control()
    if job is None or control is None:
        raise SystemExit(f"{run.path} has no running deployment: its job.json or control.json is missing")
    rank, index = frontend_place(plan(recipe), name)
    place = places(run.ranks(job.attempt))[rank]
    known = Known(run.path / "control" / f"workers-{job.attempt}-{name}.json")
    status = 0
    try:
        sockets = listeners(recipe, place, index)
        leads = functools.partial(is_head, run, job.attempt, rank)
        uvloop.run(serve(recipe, control, sockets, KeyRing(run), known, name, run.path, leads if index == 0 else None))
    except* LaunchError as errors:
        for error in errors.exceptions:
            log.error("%s: %s", name, error)
        status = 1
    return status


def listeners(recipe: Recipe, place: Place, index: int) -> list[socket.socket]:
    """Sockets, bound: one for the deployment's clients, which all frontends share, and one for this frontend alone.

    The kernel spreads connections to the shared port over the processes that listen there. A frontend that is the only one
    has just the one port.
    """
    shared = shared_port(recipe, place)
    own = int(place.port(FRONTEND_PORT + index))
    ports = [shared] if recipe.frontend.processes == 1 else [shared, own]
    return [bound(place.address, port, share=recipe.frontend.processes > 1 and port == shared) for port in ports]


def bound(address: str, port: int, share: bool) -> socket.socket:
    """A socket bound for a server; with `share` others of this user may bind the same port."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Its connections inherit it; by itself the kernel holds up to 4 MB for a client that does not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_SEND_BYTES)
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise LaunchError(f"port {port} of {address} cannot be bound: {error}") from error
    return listener


async def serve(
    recipe: Recipe,
    control: Control,
    sockets: Sequence[socket.socket],
    keys: KeyRing,
    known: Known,
    name: str,
    folder: Path,
    leads: Callable[[], bool] | None,
) -> None:
    """Serve until SIGTERM; `folder` is the run directory, `leads` says whether this process has to work on batches.

    Raises:
        ConfigError: What the recipe asks for is not there, on this node.
    """
    secure = tls.context(recipe.frontend.tls_cert, recipe.frontend.tls_key)
    tracer = tracer_of(recipe, name)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    metrics = Metrics()
    parts: list[Part] = []

    def on_change() -> None:
        for part in parts:
            part.follow(links)

    links = Links(ClientKeys.of_frontends(control), recipe.frontend.stall_timeout_s, on_change)
    parts += [part_of(one, control, name, metrics, several=len(recipe.models) > 1) for one in recipe.each]
    kv = {part.service.served.name: KvMetrics(part.router.kv) for part in parts if part.router.kv}
    metrics.registry.register(ByModel(kv))
    models = Models([part.service for part in parts])
    drawer = Drawer(folder / "files", recipe.frontend.files_max_bytes)
    batches = Batches(
        folder / "batches",
        drawer,
        recipe.frontend.batch_concurrency,
        room=lambda model: all(link.waiting == 0 for link in links if link.usable and _serves(link, models, model)),
    )
    store = Store(folder / "responses", recipe.frontend.stored_responses)
    app = App(
        models,
        metrics,
        keys,
        store,
        Files(drawer),
        batches,
        tracer,
        recipe.frontend.max_body_bytes,
        recipe.security.open_metrics,
    )
    commander = Commander(control, recipe.name, name)
    app.admin = Admin(
        Following(RunDirectory(folder), recipe, control.attempt).look,
        models,
        {served.model.name: served.key for served in recipe.models},
        commander,
        lambda member: links.by_member(member) is not None,
        keys,
        recipe.engine.drain_s,
    )
    server = Server(
        app,
        error_body,
        recipe.frontend.max_body_bytes,
        connection_limits(recipe),
        on_cut=lambda why: metrics.cut.labels(why).inc(),
    )
    report("loading")
    settle()
    etcd = Etcd(control)
    fleet = Fleet(etcd, recipe.name, name, {service.served.name: service.gate for service in models.services})
    app.admin.change_limits = fleet.change
    before = known.read()
    if before:
        links.update(before)
    async with etcd, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(known.keep(links), name="known"),
            group.create_task(follow(etcd, recipe.name, links.update), name="discovery"),
            group.create_task(
                follow_load(control, recipe.name, name, lambda event: note(links, parts, event)), name="load"
            ),
            group.create_task(fleet.follow(), name="fleet"),
            group.create_task(links.keep(), name="links"),
            group.create_task(server.keep(), name="connections"),
            group.create_task(commander.keep(), name="commands"),
            group.create_task(keys.follow(), name="keys"),
        ]
        tasks += [
            group.create_task(part.plane.keep(part.router.kv.view, part.router.kv.book, part.cards), name="kv")
            for part in parts
            if part.router.kv
        ]
        # One that comes back while others serve must not answer, for want of a view, that there is nobody.
        await links.settle(SETTLE_S)
        listening = [await loop.create_server(server.protocol, sock=item, backlog=4096, ssl=secure) for item in sockets]
        tasks.append(group.create_task(fleet.keep(), name="serves"))
        if leads is not None:
            alone = Alone(
                leads, lambda: batches.work(asks(app)), lambda: listen_locally(server, recipe.frontend.unix_socket)
            )
            await alone.look()
            tasks.append(group.create_task(alone.keep(), name="alone"))
        addresses = [item.getsockname() for item in sockets]
        where = " and ".join(f"{recipe.scheme}://{host}:{port}" for host, port, *_ in addresses)
        log.info("%s listens at %s", name, where)
        report("ready")
        await stop.wait()
        report("draining")
        models.drain()
        with contextlib.suppress(OSError, msgspec.DecodeError, TimeoutError):  # nobody waits for the shared file system
            async with asyncio.timeout(MOVED_S):
                moved = await asyncio.to_thread(RunDirectory(folder).moved)
                for part in parts:
                    part.service.moved = moved
        await drain(app, listening, server, links, recipe.engine.drain_s)
        for task in tasks:
            task.cancel()
    links.close()
    tracer.close()


class Alone:
    """What only one process of a deployment does: work on batches, and listen at the Unix socket, while its rank leads."""

    def __init__(
        self,
        leads: Callable[[], bool],
        work: Callable[[], Coroutine[Any, Any, None]],
        listen: Callable[[], Awaitable[asyncio.Server | None]],
    ) -> None:
        self._leads = leads
        self._work = work
        self._listen = listen
        self._working: asyncio.Task[None] | None = None
        self._local: asyncio.Server | None = None

    async def look(self) -> None:
        """Begin or cease, as the run directory says."""
        try:
            leads = await asyncio.to_thread(self._leads)
        except (OSError, ValueError) as error:
            log.warning("who leads cannot be read: %s", error)
            return
        if leads and self._working is None:
            self._local = await self._listen()
            self._working = asyncio.create_task(self._work(), name="batches")
        elif not leads and self._working is not None:
            log.warning("another rank leads")
            await self._cease()
        if self._working and self._working.done():
            self._working.result()

    async def keep(self) -> None:
        """Look again and again, for ever."""
        try:
            while True:
                await asyncio.sleep(LEADS_S)
                await self.look()
        finally:
            await self._cease()

    async def _cease(self) -> None:
        if self._local:
            self._local.close()
        if self._working:
            self._working.cancel()
            await asyncio.wait([self._working])
        self._local = self._working = None


def is_head(run: RunDirectory, attempt: int, rank: int) -> bool:
    """Whether the rank leads, as the run directory says."""
    return run.head(attempt).rank == rank


async def listen_locally(server: Server, path: str | None) -> asyncio.Server | None:
    """Listen at a Unix socket too, which only the owner may open; None where the recipe names none."""
    if path is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"frontend.unix_socket: {path} is there and is no socket: remove it, or name another")
        os.unlink(path)  # of a process that was killed
    mask = os.umask(0o177)
    try:
        return await asyncio.get_running_loop().create_unix_server(server.protocol, path, backlog=4096)
    except OSError as error:
        raise ConfigError(f"frontend.unix_socket: nothing can listen at {path}: {error}") from error
    finally:
        os.umask(mask)


def asks(app: App) -> Callable[[Request, Kept], Awaitable[None]]:
    """How the work on batches has a request answered: as a client would, on the deployment's own account."""

    async def ask(request: Request, reply: Kept) -> None:
        request.key_id = BATCHES
        await app(request, reply)

    return ask


def tracer_of(recipe: Recipe, name: str) -> Tracer:
    """What makes spans of requests.

    Raises:
        ConfigError: The recipe asks for it and a package is missing.
    """
    if recipe.frontend.otlp_endpoint is None:
        return Tracer()
    try:
        from workers.frontend.otlp import OtlpTracer
    except ImportError as error:
        raise ConfigError(
            f"frontend.otlp_endpoint needs OpenTelemetry ({error}): "
            "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        ) from error
    return OtlpTracer(recipe.frontend.otlp_endpoint, recipe.name, name)


async def drain(app: App, listening: Sequence[asyncio.Server], server: Server, links: Links, timeout_s: float) -> None:
    """Refuse what is new, let what runs finish for that long, end the rest with an error, then close every connection."""
    app.models.drain()
    running = [item.task for item in server.connections if item.task]
    if running:
        _, late = await asyncio.wait(running, timeout=timeout_s)
        if late:
            for service in app.models.services:
                service.gate.refuse_all(STOPPING)
            links.abort(STOPPING)
            await asyncio.wait(late, timeout=FLUSH_S)
    for listener in listening:
        listener.close()
    for connection in list(server.connections):
        connection.close()
    await server.wait_closed(FLUSH_S)


class Part:
    """What a frontend has of one model: its workers, how they are chosen, and what its requests are answered from."""

    def __init__(self, service: Service, workers: Workers, router: Router, plane: KvPlane) -> None:
        self.service = service
        self.workers = workers
        self.router = router
        self.plane = plane
        self._missing: list[Kind] | None = None

    def follow(self, links: Links) -> None:
        """Workers came, went, or are usable no more or again; says so in the log where it changes what can be answered."""
        self.workers.follow(links)
        if self.router.kv:
            self.router.kv.view.follow(self.cards())
        missing = self.service.pool.missing
        if missing != self._missing:
            self._missing = missing
            of = f" of the model {self.service.served.name}" if self.service.one_of_several else ""
            if missing:
                log.info("no %s worker%s is ready", ", ".join(missing), of)
            else:
                log.info("requests%s are routed", of)

    def cards(self) -> list[Card]:
        """Of the workers that cache prompts."""
        return [link.card for link in self.workers if link.card.kind is not Kind.ENCODE]


def part_of(recipe: Recipe, control: Control, name: str, every: Metrics, several: bool) -> Part:
    """Make the part of the model of a recipe of one; `several` says whether the deployment serves others too.

    Raises:
        ConfigError: Its tokenizer or chat template cannot be read.
    """
    metrics, workers = every.of(recipe.model.name), Workers(recipe.model.name)
    plane = KvPlane(control, recipe.name, name, alone=recipe.frontend.processes == 1)
    router = router_of(recipe, plane)
    pool = Pool(
        workers,
        router,
        recipe.disaggregated,
        lambda kind: metrics.legs(kind).inc(),
        needed=tuple(role.kind for role in recipe.roles),
        local=local_prefill(recipe),
        on_local=lambda reason: metrics.local_prefills(reason).inc(),
        on_resumed=metrics.resumed.inc,
        attempts=recipe.failover.max_attempts,
    )

    def count(kind: Kind) -> int:
        return len(pool.usable(kind))

    for role in recipe.roles:
        metrics.usable_workers(role.kind).set_function(functools.partial(count, role.kind))
    served = Served(
        name=recipe.model.name,
        max_model_len=lambda: workers.context,
        adapters=lambda: pool.adapters,
        created=int(time.time()),
        version=lambda: workers.version,
    )
    serving = serving_options(recipe, recipe.roles[-1])
    model, arguments = Path(recipe.model.path), merged(recipe, recipe.roles[-1])
    text = None
    if not worker_tokenizes(recipe.engine.tokenize, model, arguments):
        text = Text(model, serving.chat_template, serving.default_chat_template_kwargs, lambda: workers.context)
    gate = Gate(thresholds(recipe), pool.has_room, lambda why: metrics.refused(why).inc())
    pool.busy = gate.busy
    service = Service(served, text, pool, metrics, gate, tokenize=recipe.engine.tokenize, one_of_several=several)
    service.seconds_left = lambda: told(os.environ)
    return Part(service, workers, router, plane)


def router_of(recipe: Recipe, plane: KvPlane) -> Router:
    """How the recipe wants workers to be chosen; the view and the book of mode kv are kept by the plane."""
    asked = recipe.frontend
    kv = None
    if recipe.router is RouterMode.KV:
        events = recipe.publishes_kv_events
        view = KvView(plane.ask, events, PREDICTED_S if events else asked.router_ttl_s, asked.router_ttl_s)
        weights = Weights(
            overlap=asked.router_overlap_weight,
            load=asked.router_load_weight,
            balance=asked.router_balance_weight,
            temperature=asked.router_temperature,
        )
        kv = KvRouter(view, Book(), weights)
        kv.on_routed = plane.routed
    direct = recipe.router is RouterMode.DIRECT
    return Router(
        choose={kind: mode(recipe.router) for kind in Kind},
        kv=kv,
        sessions=asked.router_sessions,
        direct=asked.router_direct or direct,
        must_name=direct,
    )


def local_prefill(recipe: Recipe) -> LocalPrefill:
    """When decode workers compute prompts themselves."""
    return LocalPrefill(
        mode=recipe.frontend.local_prefill,
        short_tokens=recipe.frontend.local_prefill_short_tokens,
        behind_tokens=recipe.frontend.local_prefill_behind_tokens,
        room_tokens=recipe.frontend.local_prefill_room_tokens,
    )


def thresholds(recipe: Recipe) -> Thresholds:
    """The limits of load to begin with."""
    return Thresholds(**{name: getattr(recipe.frontend, name) for name in Thresholds.__struct_fields__})


def connection_limits(recipe: Recipe) -> ConnectionLimits:
    """What clients' connections may do; no more of them than there are descriptors for."""
    wanted = recipe.frontend.max_connections
    allowed = raise_descriptor_limit(wanted)
    if allowed < wanted:
        log.warning("%d connections at once instead of %d: raise `ulimit -n` for more", allowed, wanted)
    return ConnectionLimits(
        connections=allowed,
        keep_alive_s=recipe.frontend.keep_alive_s,
        request_s=recipe.frontend.request_timeout_s,
        reader_s=recipe.frontend.reader_timeout_s,
        unsent_bytes=recipe.frontend.max_unsent_bytes,
    )


def note(links: Links, parts: Sequence[Part], event: LoadEvent) -> None:
    """Keep what a worker reported for the router of its model."""
    link = links.by_member(event.member)
    if link is None or link.card.instance != event.instance:
        return
    link.report(event.waiting, event.kv_usage)
    card = link.card
    for part in parts:
        if part.router.kv and part.workers.model == card.model:
            for rank in range(card.dp_first, card.dp_first + card.dp_count):
                # Of several ranks the fullest one is reported: an excess that all share does not move a choice among them.
                part.router.kv.book.reported((card.instance, rank), round(event.kv_usage * card.kv_blocks))


def _serves(link: Link, models: Models, name: Any) -> bool:
    """Whether a worker would be asked for a model by that name; of a name that nobody has, none is."""
    try:
        return link.card.model == models.find(name if isinstance(name, str) else None).served.name
    except ApiError:
        return False


if __name__ == "__main__":
    sys.exit(main())
