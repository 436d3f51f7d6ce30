"""A frontend process: `python -m workers.frontend RUN_DIR NAME`, started by rank 0's agent."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import sys
import time
from pathlib import Path

import uvloop

from launch.plan import FRONTEND_PORT, plan
from launch.recipe import Kind, Recipe
from launch.records import Control, RunDirectory
from slurm.children import report
from slurm.places import Place, places
from workers.engine.options import serving_options
from workers.frontend.admin import Admin
from workers.frontend.app import App, Served
from workers.frontend.errors import error_body
from workers.frontend.exchange import Pool
from workers.frontend.http import Server
from workers.frontend.known import Known
from workers.frontend.links import Links
from workers.frontend.local import LocalPrefill
from workers.frontend.metrics import Metrics
from workers.frontend.router import mode
from workers.frontend.text import Text
from workers.runtime.commands import Commander
from workers.runtime.curve import ClientKeys
from workers.runtime.etcd import Etcd
from workers.runtime.events import LoadEvent, follow_load
from workers.runtime.keys import KeyRing
from workers.runtime.logs import set_up_logging
from workers.runtime.registry import follow

log = logging.getLogger("workers.frontend")

FLUSH_S = 2.0
SETTLE_S = 1.0


def main() -> int:
    """Serve until SIGTERM, then let what runs finish."""
    run, name = RunDirectory(Path(sys.argv[1])), sys.argv[2]
    set_up_logging(name)
    recipe, job, control = run.recipe(), run.job(), run.control()
    if job is None or control is None:
        raise SystemExit(f"{run.path} has no running deployment: its job.json or control.json is missing")
    place = places(run.ranks(job.attempt))[0]
    index = plan(recipe).frontends.index(name)
    known = Known(run.path / "control" / f"workers-{job.attempt}-{name}.json")
    uvloop.run(serve(recipe, control, place, port_of(recipe, place, index), KeyRing(run), known, name))
    return 0


def port_of(recipe: Recipe, place: Place, index: int) -> int:
    """The port of a frontend process: the recipe's, counting up, or one of the rank's block."""
    if recipe.frontend.port is not None:
        return recipe.frontend.port + index
    return int(place.port(FRONTEND_PORT + index))


async def serve(
    recipe: Recipe, control: Control, place: Place, port: int, keys: KeyRing, known: Known, name: str
) -> None:
    """Serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    metrics = Metrics()
    readiness = Readiness()
    links = Links(ClientKeys.of_frontends(control), recipe.frontend.stall_timeout_s, lambda: readiness.look(pool))
    pool = Pool(
        links,
        {kind: mode(recipe.frontend.router) for kind in Kind},
        recipe.disaggregated,
        lambda kind: metrics.legs.labels(kind).inc(),
        needed=tuple(role.kind for role in recipe.roles),
        local=local_prefill(recipe),
        on_local=lambda reason: metrics.local_prefills.labels(reason).inc(),
        on_resumed=metrics.resumed.inc,
        attempts=recipe.failover.max_attempts,
    )

    def count(kind: Kind) -> int:
        return len(pool.usable(kind))

    for role in recipe.roles:
        metrics.usable_workers.labels(role.kind).set_function(functools.partial(count, role.kind))
    served = Served(
        name=recipe.model.name,
        max_model_len=lambda: context_of(links),
        adapters=lambda: pool.adapters,
        created=int(time.time()),
    )
    serving = serving_options(recipe, recipe.roles[-1])
    text = Text(Path(recipe.model.path), serving.chat_template, serving.default_chat_template_kwargs)
    app = App(served, text, pool, metrics, keys, recipe.security.open_metrics)
    commander = Commander(control, recipe.name, name)
    app.admin = Admin(
        plan(recipe),
        commander,
        lambda member: links.by_member(member) is not None,
        keys,
        recipe.engine.drain_s,
    )
    server = Server(app, error_body, recipe.frontend.max_body_bytes)
    report("loading")
    etcd = Etcd(control)
    before = known.read()
    if before:
        links.update(before)
    async with etcd, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(known.keep(links), name="known"),
            group.create_task(follow(etcd, recipe.name, links.update), name="discovery"),
            group.create_task(follow_load(control, recipe.name, name, lambda event: note(links, event)), name="load"),
            group.create_task(links.keep(), name="links"),
            group.create_task(commander.keep(), name="commands"),
            group.create_task(keys.follow(), name="keys"),
            group.create_task(server.sweep(), name="sweep"),
        ]
        # One that comes back while others serve must not answer, for want of a view, that there is nobody.
        await links.settle(SETTLE_S)
        listener = await loop.create_server(server.protocol, place.address, port, backlog=4096, reuse_address=True)
        log.info("%s listens at http://%s:%d", name, place.address, port)
        report("ready")
        await stop.wait()
        report("draining")
        await drain(app, listener, server, links, recipe.engine.drain_s)
        for task in tasks:
            task.cancel()
    links.close()


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
