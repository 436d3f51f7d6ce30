"""A frontend process: `python -m workers.frontend RUN_DIR NAME`, started by rank 0's agent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from launch.errors import ConfigError
from launch.plan import FRONTEND_PORT, plan
from launch.recipe import Kind, Recipe
from launch.records import Control, RunDirectory
from slurm.children import report
from slurm.places import Place, places
from workers.engine.options import serving_options
from workers.frontend import tls
from workers.frontend.admin import Admin
from workers.frontend.app import App
from workers.frontend.batches import Batches
from workers.frontend.errors import error_body
from workers.frontend.exchange import Pool
from workers.frontend.files import Drawer, Files
from workers.frontend.http import Request, Server
from workers.frontend.links import Links
from workers.frontend.local import LocalPrefill
from workers.frontend.metrics import Metrics
from workers.frontend.reply import Kept
from workers.frontend.router import mode
from workers.frontend.service import Served
from workers.frontend.stored import Store
from workers.frontend.text import Text
from workers.frontend.trace import Tracer
from workers.runtime.commands import Commander
from workers.runtime.etcd import Etcd
from workers.runtime.events import LoadEvent, follow_load
from workers.runtime.logs import set_up_logging
from workers.runtime.registry import follow

log = logging.getLogger("workers.frontend")

FLUSH_S = 2.0


def main() -> int:
    """Serve until SIGTERM, then let what runs finish."""
    run, name = RunDirectory(Path(sys.argv[1])), sys.argv[2]
    set_up_logging(name)
    recipe, job, control = run.recipe(), run.job(), run.control()
    if job is None or control is None:
        raise SystemExit(f"{run.path} has no running deployment: its job.json or control.json is missing")
    place = places(run.ranks(job.attempt))[0]
    index = plan(recipe).frontends.index(name)
    keys = (run.api_key(), run.admin_key())
    try:
        uvloop.run(serve(recipe, control, place, port_of(recipe, place, index), keys, name, run.path))
    except ConfigError as error:
        log.error("%s: %s", name, error)
        return 1
    return 0


def port_of(recipe: Recipe, place: Place, index: int) -> int:
    """The port of a frontend process: the recipe's, counting up, or one of the rank's block."""
    if recipe.frontend.port is not None:
        return recipe.frontend.port + index
    return int(place.port(FRONTEND_PORT + index))


async def serve(
    recipe: Recipe, control: Control, place: Place, port: int, keys: tuple[str, str], name: str, folder: Path
) -> None:
    """Serve until SIGTERM; `keys` are the API's and the operators', `folder` is the run directory.

    Raises:
        ConfigError: What the recipe asks for is not there, on this node.
    """
    api_key, admin_key = keys
    first = plan(recipe).frontends[0] == name
    secure = tls.context(recipe.frontend.tls_cert, recipe.frontend.tls_key)
    tracer = tracer_of(recipe, name)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    metrics = Metrics()
    readiness = Readiness()
    links = Links(control.worker_public, recipe.frontend.stall_timeout_s, lambda: readiness.look(pool))
    pool = Pool(
        links,
        {kind: mode(recipe.frontend.router) for kind in Kind},
        recipe.disaggregated,
        lambda kind: metrics.legs.labels(kind).inc(),
        needed=tuple(role.kind for role in recipe.roles),
        local=local_prefill(recipe),
        on_local=lambda reason: metrics.local_prefills.labels(reason).inc(),
        on_resumed=metrics.resumed.inc,
    )
    served = Served(
        name=recipe.model.name,
        max_model_len=lambda: context_of(links),
        adapters=lambda: pool.adapters,
        created=int(time.time()),
        version=lambda: next((link.card.version for link in links), ""),
    )
    serving = serving_options(recipe, recipe.roles[-1])
    text = Text(
        Path(recipe.model.path), serving.chat_template, serving.default_chat_template_kwargs, lambda: context_of(links)
    )
    drawer = Drawer(folder / "files", recipe.frontend.files_max_bytes)
    batches = Batches(
        folder / "batches",
        drawer,
        recipe.frontend.batch_concurrency,
        room=lambda: all(link.waiting == 0 for link in links if link.usable),
    )
    store = Store(folder / "responses", recipe.frontend.stored_responses)
    app = App(served, text, pool, metrics, api_key, store, Files(drawer), batches, tracer)
    commander = Commander(control, recipe.name, name)
    app.admin = Admin(
        plan(recipe),
        commander,
        lambda member: links.by_member(member) is not None,
        admin_key,
        api_key,
        recipe.engine.drain_s,
    )
    server = Server(app, error_body, recipe.frontend.max_body_bytes)
    listener = await loop.create_server(
        server.protocol, place.address, port, backlog=4096, reuse_address=True, ssl=secure
    )
    local = await listen_locally(server, recipe.frontend.unix_socket) if first else None
    report("loading")
    log.info("%s listens at %s://%s:%d", name, recipe.scheme, place.address, port)
    etcd = Etcd(control.etcd_url, control.etcd_user, control.etcd_password)
    async with etcd, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(follow(etcd, recipe.name, links.update), name="discovery"),
            group.create_task(follow_load(control, recipe.name, name, lambda event: note(links, event)), name="load"),
            group.create_task(links.keep(), name="links"),
            group.create_task(commander.keep(), name="commands"),
        ]
        if first:
            tasks.append(group.create_task(batches.work(asks(app, api_key)), name="batches"))
        report("ready")
        await stop.wait()
        report("draining")
        if local is not None:
            local.close()
        await drain(app, listener, server, links, recipe.engine.drain_s)
        for task in tasks:
            task.cancel()
    links.close()
    tracer.close()


async def listen_locally(server: Server, path: str | None) -> asyncio.Server | None:
    """Listen at a Unix socket too, which only the owner may open; None where the recipe names none."""
    if path is None:
        return None
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # of a process that was killed
    mask = os.umask(0o177)
    try:
        return await asyncio.get_running_loop().create_unix_server(server.protocol, path, backlog=4096)
    except OSError as error:
        raise ConfigError(f"frontend.unix_socket: nothing can listen at {path}: {error}") from error
    finally:
        os.umask(mask)


def asks(app: App, api_key: str) -> Callable[[Request, Kept], Awaitable[None]]:
    """How the work on batches has a request answered: as a client would."""

    async def ask(request: Request, reply: Kept) -> None:
        request.headers["authorization"] = f"Bearer {api_key}"
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


async def drain(app: App, listener: asyncio.Server, server: Server, links: Links, timeout_s: float) -> None:
    """Refuse what is new, let what runs finish for that long, end the rest with an error, then close every connection."""
    app.draining = True
    running = [item.task for item in server.connections if item.task]
    if running:
        _, late = await asyncio.wait(running, timeout=timeout_s)
        if late:
            links.abort("the deployment is stopping")
            await asyncio.wait(late, timeout=FLUSH_S)
    listener.close()
    for connection in list(server.connections):
        connection.close()
    await server.wait_closed(FLUSH_S)


class Readiness:
    """Says so in the log when the deployment begins or ceases to be able to answer."""

    def __init__(self) -> None:
        self._missing: list[Kind] | None = None

    def look(self, pool: Pool) -> None:
        """Compare with what was so before."""
        missing = pool.missing
        if missing != self._missing:
            self._missing = missing
            log.info(
                "requests are routed" if not missing else "no %s worker is ready",
                *([", ".join(missing)] if missing else []),
            )


def local_prefill(recipe: Recipe) -> LocalPrefill:
    """When decode workers compute prompts themselves."""
    return LocalPrefill(
        mode=recipe.frontend.local_prefill,
        short_tokens=recipe.frontend.local_prefill_short_tokens,
        behind_tokens=recipe.frontend.local_prefill_behind_tokens,
        room_tokens=recipe.frontend.local_prefill_room_tokens,
    )


def context_of(links: Links) -> int:
    """The shortest context among the workers; 0 while there is none."""
    return min((link.card.max_model_len for link in links), default=0)


def note(links: Links, event: LoadEvent) -> None:
    """Keep what a worker reported for the router."""
    link = links.by_member(event.member)
    if link is not None and link.card.instance == event.instance:
        link.report(event.waiting)


if __name__ == "__main__":
    sys.exit(main())
