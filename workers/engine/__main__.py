"""The process of one engine member: `python -m workers.engine RUN_DIR MEMBER`, started by the agent of its node.

In order: build the engine, serve the request plane, register. On SIGTERM in reverse: withdraw, let what runs finish, end
the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

import uvloop
import zmq
from prometheus_client import REGISTRY, start_http_server

from launch.errors import LaunchError
from launch.plan import Member, Plan, dp_ranks, plan
from launch.recipe import Backend, Executor, Recipe
from launch.records import Control, RunDirectory
from slurm.children import report
from slurm.places import Place, places
from slurm.together import GENERATION
from workers.engine import connectors, orphans, ray_cluster
from workers.engine.arguments import engine_arguments, fingerprint, role_of
from workers.engine.base import Engine
from workers.engine.checks import check_engines
from workers.engine.follower import follow
from workers.engine.model import read_shape
from workers.engine.server import RequestServer
from workers.runtime.etcd import Etcd
from workers.runtime.events import LoadEvent, publish_load
from workers.runtime.logs import set_up_logging
from workers.runtime.registry import Card, registered

log = logging.getLogger("workers.engine")

HEALTH_S = 0.25


def main() -> int:
    """Serve one member until SIGTERM; 0 after a clean end, 1 when the engine died."""
    run, name = RunDirectory(Path(sys.argv[1])), sys.argv[2]
    set_up_logging(name)
    orphans.die_with(os.getpid())
    recipe, job, control = run.recipe(), run.job(), run.control()
    if job is None or control is None:
        raise SystemExit(f"{run.path} has no running deployment: its job.json or control.json is missing")
    where = plan(recipe)
    member = where.member(name)
    known = places(run.ranks(job.attempt))
    role = role_of(recipe, member)
    life = f"{job.submitted_at}/{os.environ.get(GENERATION, '')}"
    try:
        arguments = prepared(recipe, where, member, known, life)
        with contextlib.ExitStack() as around:
            ray = ray_cluster.start_command(where, member, known, ray_cluster.temp_dir())
            if not member.leader:
                return follow(recipe, role.executor, arguments, ray)
            if role.executor is Executor.RAY and recipe.engine.backend is Backend.VLLM:
                at = ray_cluster.address(where, member, known)
                around.enter_context(ray_cluster.head(ray, at, recipe.engine.ready_timeout_s))
            engine = build(recipe, arguments)
            around.callback(engine.shutdown, timeout_s=5)
            return uvloop.run(serve(recipe, member, known[member.rank], control, engine))
    except LaunchError as error:
        log.error("%s: %s", name, error)
        return 1


def prepared(recipe: Recipe, where: Plan, member: Member, known: dict[int, Place], life: str) -> dict[str, Any]:
    """vLLM's engine arguments of the member; `life` tells this start of its engine from others.

    Raises:
        ConfigError: The model does not fit them, or this environment lacks a package that they need.
    """
    arguments = engine_arguments(recipe, where, member, known)
    transfer = arguments.get("kv_transfer_config")
    if recipe.engine.backend is Backend.VLLM:
        check_engines(recipe, read_shape(Path(recipe.model.path)))  # where it was launched the model may not be
        connectors.require_packages(transfer)
        if role_of(recipe, member).executor is Executor.RAY:
            ray_cluster.require_ray()
    if transfer and member.nodes > 1 and not member.by_data:
        arguments["kv_transfer_config"] = connectors.with_engine_id(transfer, f"{life}/{member.engine}")
    return arguments


def build(recipe: Recipe, arguments: dict[str, Any]) -> Engine:
    """The engine of the member, up and ready; blocks. No loop or thread of ours runs yet: vLLM may fork."""
    report("loading")
    if recipe.engine.backend is Backend.ECHO:
        from tokenizers import Tokenizer

        from workers.engine.echo import EchoEngine

        return EchoEngine(Tokenizer.from_file(f"{recipe.model.path}/tokenizer.json"), recipe.engine.echo_interval_s)
    from workers.engine import vllm_engine

    return vllm_engine.start(arguments)


async def serve(recipe: Recipe, member: Member, place: Place, control: Control, engine: Engine) -> int:
    """Serve until SIGTERM or the engine's death."""
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    card = card_of(recipe, member, place, engine)
    server = RequestServer(engine, card.instance, REGISTRY)
    context: zmq.Context[Any] = zmq.Context()
    server.bind(context, card.address, (control.worker_public, control.worker_secret))
    start_http_server(int(place.port(member.ports.metrics)), place.address)

    def load() -> LoadEvent:
        now = engine.load
        return LoadEvent(
            member=member.name, instance=card.instance, running=now.running, waiting=now.waiting, kv_usage=now.kv_usage
        )

    etcd = Etcd(control.etcd_url, control.etcd_user, control.etcd_password)
    async with etcd, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(server.beat(), name="beat"),
            group.create_task(publish_load(control, recipe.name, load), name="load"),
        ]
        async with registered(etcd, recipe.name, card, recipe.control.lease_ttl_s):
            report("ready")
            log.info("%s serves %s at %s", member.name, recipe.model.name, card.address)
            death = await until_stopped(engine, stop)
            report("draining", death or "")
        if death is None:
            await server.drain(recipe.engine.drain_s)
        for task in tasks:
            task.cancel()
        server.close()
    context.term()
    if death:
        log.error("%s: %s", member.name, death)
    return 1 if death else 0


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
        dp_first=dp_first,
        dp_count=dp_count,
        fingerprint=fingerprint(recipe, role, engine.sizes.version),
    )


async def until_stopped(engine: Engine, stop: asyncio.Event) -> str | None:
    """Wait for SIGTERM, which returns None, or for the engine's death, which returns why."""
    while not stop.is_set():
        death = engine.dead()
        if death:
            return death
        try:
            async with asyncio.timeout(HEALTH_S):
                await stop.wait()
        except TimeoutError:
            continue
    return None


if __name__ == "__main__":
    sys.exit(main())
