"""A node of an engine that another node leads: it computes, and talks to nobody but the engine.

It does not register and serves no requests. That its engine is gone it does not notice by itself (vLLM 0.32: workers wait
for node 0 for ever); the agents see to that (`slurm.together`).
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from launch.recipe import Backend, Executor, Recipe
from slurm.children import report
from workers.runtime.collector import for_good

log = logging.getLogger(__name__)


def follow(
    recipe: Recipe, executor: Executor, arguments: dict[str, Any], join: tuple[str, ...], on_up: Callable[[], None]
) -> int:
    """Take part in the engine until SIGTERM, which returns 0, or until a worker of this node dies, which returns 1.

    Args:
        recipe: The recipe.
        executor: What runs the engine.
        arguments: vLLM's engine arguments of this node.
        join: With Ray, the command that makes this node one of the engine's cluster.
        on_up: Called once it is up, when nothing forks this process any more: it may start threads.
    """
    report("loading")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _leave_in_order if executor is Executor.RAY else _leave)
    if recipe.engine.backend is Backend.ECHO:
        on_up()
        return _wait()
    if executor is Executor.RAY:
        from workers.engine import ray_cluster

        on_up()
        return ray_cluster.join(join, recipe.engine.ready_timeout_s)
    return _compute(arguments, on_up)


def _compute(arguments: dict[str, Any], on_up: Callable[[], None]) -> int:
    """What `vllm serve --headless` does for a node above 0 (vLLM 0.32, entrypoints/cli/serve.py).

    But for the end: vLLM then waits up to 9 s for workers that cannot leave without node 0's. Here they are left to the
    orphan guard and the agent, which end them at once; there is nothing of theirs to save.
    """
    with for_good():
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        from workers.engine.configuration import configuration

        config = configuration(arguments, headless=True)
    executor = MultiprocExecutor(config, monitor_workers=False)
    on_up()
    report("ready")
    multiprocessing.connection.wait([worker.proc.sentinel for worker in executor.workers])
    log.error("a worker of this node died")
    _exit(1)


def _wait() -> NoReturn:
    """An echo engine computes nothing, here neither."""
    report("ready")
    while True:
        signal.pause()


def _leave(signum: int, frame: object) -> None:
    report("draining")
    _exit(0)


def _leave_in_order(signum: int, frame: object) -> None:
    report("draining")
    sys.exit(0)  # past whoever has to end Ray first


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    os._exit(code)
