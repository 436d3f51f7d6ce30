"""What asks an agent's process to end: signals, and the time limit of its job."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import Callable

from launch.recipe import Recipe
from launch.records import Job
from slurm import limit, signals
from slurm.batch import notice_s
from slurm.rank import POLL_S

log = logging.getLogger(__name__)


def listen(stop: asyncio.Event, notice: asyncio.Event, end_now: Callable[[], None]) -> None:
    """SIGTERM, SIGINT, USR2 and what `launch.stop` sends ask for the end; a second SIGTERM or SIGINT ends everything at once.

    One that comes within a moment is the same wish: scancel's comes from Slurm and from srun.
    Slurm's notice before the time limit only announces it. What came before we listened counts as well.
    """
    asked_at = math.inf

    def insist() -> None:
        nonlocal asked_at
        now = time.monotonic()
        if now - asked_at > signals.AGAIN_AFTER_S:
            log.warning("asked again: ending everything now")
            end_now()
        asked_at = min(asked_at, now)
        stop.set()

    loop = asyncio.get_running_loop()
    handlers: dict[int, Callable[[], None]] = {signal.SIGTERM: insist, signal.SIGINT: insist}
    handlers |= {signals.NOTICE: notice.set, signals.STOP: stop.set, signal.SIGUSR2: stop.set}
    for signum, handler in handlers.items():
        loop.add_signal_handler(signum, handler)
    for signum in signals.came():
        handlers[signum]()


async def before_the_limit(
    recipe: Recipe, job: Job, leads: Callable[[], bool], notice: asyncio.Event, stop: asyncio.Event
) -> None:
    """After Slurm's notice, set `stop` when what runs can still finish before the time limit, and not before.

    The notice comes up to a minute early, and the limit may be moved: so the time is asked for, by the head for all.
    """
    await notice.wait()
    while not leads():  # noqa: ASYNC110  # what changes is a file
        await asyncio.sleep(POLL_S)  # the head decides for all, see `Others.follow_head`; this rank may become it yet
    need_s = notice_s(recipe)
    while True:
        end = await asyncio.to_thread(limit.ends_at, job.launcher, os.environ)
        left = limit.seconds_left(end, need_s)
        if not left:
            break
        log.info("Slurm ends the job in %.0f s; requests are admitted for another %.0f s", left + need_s, left)
        await asyncio.sleep(left)
    log.info("the time limit is near: stopping")
    stop.set()
