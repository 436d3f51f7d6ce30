"""The process of one engine member: `python -m workers.engine RUN_DIR MEMBER`, started by the agent of its node.

In order: build the engine, serve the request plane, register. On SIGTERM in reverse: withdraw, let what runs finish, wait
for the pulls of what was computed for others, end the engine. `workers.engine.leaving` has the other ways out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
import zmq
from prometheus_client import CollectorRegistry

from launch.elastic import plan_of
from launch.errors import LaunchError
from launch.plan import Member, Plan, dp_ranks
from launch.recipe import Backend, Executor, Kind, Recipe, Role
from launch.records import Control, RunDirectory
from slurm import shield
from slurm.children import report
from slurm.commands import MODEL_PATH
from slurm.places import Place, places
from slurm.together import GENERATION
from workers.engine import connectors, kv, orphans, ray_cluster
from workers.engine.arguments import engine_arguments, fingerprint, role_of
from workers.engine.base import Engine
from workers.engine.checks import check_engines
from workers.engine.follower import follow
from workers.engine.health import OperatorGate, Pulse, Standing, Watch
from workers.engine.kept_adapters import KeptAdapters
from workers.engine.leaving import Stop, leave, leave_at_once, time_for_pulls, until_pulled, until_stopped
from workers.engine.metrics import Canaries, Labelled, WorkerFamilies
from workers.engine.model import read_shape
from workers.engine.operations import operated
from workers.engine.options import serving_options
from workers.engine.page import MetricsPage, own_multiprocess_folder, process_families
from workers.engine.server import RequestServer
from workers.runtime import wire
from workers.runtime.collector import settle
from workers.runtime.curve import ServerKeys
from workers.runtime.etcd import Etcd
from workers.runtime.events import LoadEvent, publish_load
from workers.runtime.keys import KeyRing
from workers.runtime.logs import set_up_logging
from workers.runtime.registry import Card, Offer, registered

log = logging.getLogger("workers.engine")

ENGINE_STOP_S = 5.0
LEAVING = "leaving"


def main() -> int:
    """Serve one member until SIGTERM; 0 after a clean end, 1 when the engine died."""
    shield.hear_with_multiprocessing()
    run, name = RunDirectory(Path(sys.argv[1])), sys.argv[2]
    set_up_logging(name)
    orphans.die_with(os.getpid())
    recipe, job, control = run.recipe(), run.job(), run.control()
    if job is None or control is None:
        raise SystemExit(f"{run.path} has no running deployment: its job.json or control.json is missing")
    where = plan_of(run, recipe, job.attempt)
    member = where.member(name)
    recipe = recipe.of(
        member.model, os.environ.get(MODEL_PATH)
    )  # where this node has a copy of its own (slurm.staging)
    known = places(run.ranks(job.attempt))
    role = role_of(recipe, member)
    life = f"{job.submitted_at}/{os.environ.get(GENERATION, '')}"
    try:
        own_multiprocess_folder(name)
        encoder_cache = run.path / "encoder_cache" / f"{job.submitted_at:.6f}"
        if member.kind is Kind.ENCODE:
            forget_others(encoder_cache)
        encoder_cache /= member.model  # what one model's encoder makes of an image is nothing to another's
        arguments = prepared(recipe, where, member, known, life, encoder_cache)
        with contextlib.ExitStack() as around:
            ray = ray_cluster.start_command(where, member, known, ray_cluster.temp_dir())
            if not member.leader:
                place, admits = known[member.rank], admission(recipe, KeyRing(run))
                return follow(recipe, role.executor, arguments, ray, lambda: show(recipe, member, place, admits))
            if role.executor is Executor.RAY and recipe.engine.backend is Backend.VLLM:
                at = ray_cluster.address(where, member, known)
                around.enter_context(ray_cluster.head(ray, at, recipe.engine.ready_timeout_s))
            engine = build(recipe, role, arguments)
            around.callback(engine.shutdown, timeout_s=ENGINE_STOP_S)
            kept = KeptAdapters(run.path / "adapters" / f"{name}.json", job.submitted_at)
            death = uvloop.run(serve(recipe, member, known[member.rank], control, KeyRing(run), engine, kept))
            if death is None:
                return 0
            log.error("%s: %s", name, death)
            if role.executor is not Executor.RAY:  # Ray's own processes are not in our group: they are ended in order
                leave_at_once(1)
            return 1
    except LaunchError as error:
        log.error("%s: %s", name, error)
        return 1


def forget_others(folder: Path) -> None:
    """Delete what earlier launches of this name kept beside the folder: it may be another model's."""
    for path in folder.parent.glob("*"):
        if path != folder:
            shutil.rmtree(path, ignore_errors=True)


def prepared(
    recipe: Recipe, where: Plan, member: Member, known: dict[int, Place], life: str, encoder_cache: Path
) -> dict[str, Any]:
    """vLLM's engine arguments of the member; `life` tells this start of its engine from others.

    Raises:
        ConfigError: The model does not fit them, or this environment lacks a package that they need.
    """
    arguments = engine_arguments(recipe, where, member, known, str(encoder_cache))
    transfer = arguments.get("kv_transfer_config")
    if recipe.engine.backend is Backend.VLLM:
        check_engines(recipe, read_shape(Path(recipe.model.path)))  # where it was launched the model may not be
        connectors.require_packages(transfer)
        if role_of(recipe, member).executor is Executor.RAY:
            ray_cluster.require_ray()
    if transfer and member.nodes > 1 and not member.by_data:
        arguments["kv_transfer_config"] = connectors.with_engine_id(transfer, f"{life}/{member.engine}")
    return arguments


def build(recipe: Recipe, role: Role, arguments: dict[str, Any]) -> Engine:
    """The engine of the member, up and ready; blocks. No loop or thread of ours runs yet: vLLM may fork."""
    report("loading")
    if recipe.engine.backend is Backend.ECHO:
        from tokenizers import Tokenizer

        from workers.engine.echo import EchoEngine
        from workers.engine.echo_cache import CachingEcho

        tokenizer, asked = Tokenizer.from_file(f"{recipe.model.path}/tokenizer.json"), recipe.engine
        if asked.echo_cache_blocks:
            rate = asked.echo_prefill_tokens_per_s
            return CachingEcho(tokenizer, asked.echo_interval_s, asked.echo_cache_blocks, rate, asked.echo_slots)
        return EchoEngine(tokenizer, asked.echo_interval_s, asked.echo_slots)
    from workers.engine import vllm_engine

    # Slurm signals every process of a step. An engine core that gets SIGTERM aborts what it runs unless it has time.
    patient = {"shutdown_timeout": int(recipe.engine.drain_s)}
    return vllm_engine.start(patient | arguments, serving_options(recipe, role))


async def serve(
    recipe: Recipe,
    member: Member,
    place: Place,
    control: Control,
    keys: KeyRing,
    engine: Engine,
    kept: KeptAdapters,
) -> str | None:
    """Serve until SIGTERM, which returns None, or the engine's death, which returns why."""
    stop = Stop()
    card = card_of(recipe, member, place, engine)
    offer = Offer(card)
    registry = CollectorRegistry()
    server = RequestServer(engine, card.instance, registry)
    context: zmq.Context[Any] = zmq.Context()
    server.bind(context, card.address, ServerKeys.of_workers(control))

    def on_standing(serving: bool) -> None:
        server.admit() if serving else server.withdraw()

    standing, pulse, canaries = Standing(on_standing), Pulse(), Canaries()
    ours = WorkerFamilies(engine.stats, server.outcomes, canaries, lambda: standing.serving)
    families = Labelled(labels_of(recipe, member), (registry, ours), process_families())
    page = MetricsPage(families, lambda: standing.reason, lambda: pulse.alive, admission(recipe, keys))
    page.start(place.address, int(place.port(member.ports.metrics)))
    settle()

    def load() -> LoadEvent:
        now = engine.load
        return LoadEvent(
            member=member.name, instance=card.instance, running=now.running, waiting=now.waiting, kv_usage=now.kv_usage
        )

    def on_sick(reason: str) -> None:
        server.give_back(wire.Failed(0, 503, reason, True))

    gate = OperatorGate(standing, server)
    watch = Watch(engine, standing, canaries, on_sick)
    etcd = Etcd(control)
    async with etcd, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(server.beat(), name="beat"),
            group.create_task(pulse.beat(), name="pulse"),
            group.create_task(keys.follow(), name="keys"),
            group.create_task(publish_load(control, recipe.name, load), name="load"),
            group.create_task(
                watch.run(
                    recipe.engine.canary_interval_s,
                    recipe.engine.canary_timeout_s,
                    recipe.frontend.stall_timeout_s,
                    lambda: server.streams,
                ),
                name="watch",
            ),
        ]
        # Before it is registered a restarted worker has its adapters again: those who ask for one must not miss it.
        async with (
            kv.published(recipe, member, place, control, engine, offer.card, context) as on_cleared,
            operated(control, recipe, member.name, engine, gate, offer.update, kept, on_cleared),
            registered(etcd, recipe.name, offer, recipe.control.lease_ttl_s),
        ):
            report("ready")
            log.info("%s serves %s at %s", member.name, recipe.model.name, card.address)
            death = await until_stopped(engine, stop)
            offer.registration = None  # a change that is under way must not bring the card back
            report("draining", death or "")
            standing.out(LEAVING, death or "draining")
            if death:
                server.give_back(wire.Failed(0, 503, death, True))
        if death is None:
            await drain(recipe, engine, server)
        for task in tasks:
            task.cancel()
        server.close()
    page.close()
    context.term()
    return death


def admission(recipe: Recipe, keys: KeyRing) -> Callable[[str], bool]:
    """Whether a key that was presented may see a member's metrics."""
    return lambda key: recipe.security.open_metrics or keys.find(key) is not None


def show(recipe: Recipe, member: Member, place: Place, admits: Callable[[str], bool]) -> None:
    """The page of a member that serves no requests: that it lives, and its process's metrics.

    It has no loop that would read keys again: those of its start are good until its end.
    """
    families = Labelled(labels_of(recipe, member), (), process_families())
    page = MetricsPage(families, lambda: None, lambda: True, admits)
    page.start(place.address, int(place.port(member.ports.metrics)))


async def drain(recipe: Recipe, engine: Engine, server: RequestServer) -> None:
    """Let what runs finish, then what was computed for others be pulled."""
    begun = time.monotonic()
    await server.drain(recipe.engine.drain_s)
    used_s = time.monotonic() - begun
    await until_pulled(engine.stats, time_for_pulls(engine.sizes.lease_s, recipe.engine.drain_s, used_s))
    log.info("drained in %.1f s", time.monotonic() - begun)


def labels_of(recipe: Recipe, member: Member) -> dict[str, str]:
    """What tells the member's metrics from those of others."""
    return {
        "deployment": recipe.name,
        "role": str(member.kind),
        "replica": str(member.replica),
        "member": member.name,
        "model": recipe.model.name,
    }


def card_of(recipe: Recipe, member: Member, place: Place, engine: Engine) -> Card:
    """What the member registers."""
    role = role_of(recipe, member)
    dp_first, dp_count = dp_ranks(role, member)
    return Card(
        member=member.name,
        instance=secrets.token_hex(8),
        kind=member.kind,
        address=f"tcp://{place.address}:{place.port(member.ports.requests)}",
        metrics=f"{place.address}:{place.port(member.ports.metrics)}",
        model=recipe.model.name,
        max_model_len=engine.sizes.max_model_len,
        block_size=engine.sizes.block_size,
        version=engine.sizes.version,
        tasks=engine.sizes.tasks,
        dp_first=dp_first,
        dp_count=dp_count,
        fingerprint=fingerprint(recipe, role, engine.sizes.version),
        kv_blocks=engine.sizes.kv_blocks,
    )


if __name__ == "__main__":
    leave(main())
