"""Signals that come before the agent listens.

Python ends at SIGTERM and USR1, and importing takes a while: a `scancel` in that moment would kill the task of one rank,
with nobody told. So the first thing a task does is to hold them; the agent asks what came.
"""

from __future__ import annotations

import signal

# Slurm's notice before the time limit, as the batch script asks for it.
NOTICE = signal.SIGUSR1
# Our own request to stop. scancel sends a signal to every process of a step, children of children included: this one they
# ignore, unless they ask for it, and so do other programs' servers.
STOP = signal.SIGURG
HELD = (signal.SIGTERM, NOTICE, STOP, signal.SIGUSR2)
# scancel's SIGTERM comes from Slurm and from srun, which passes its own on: one wish, told twice within a moment, which on
# a busy machine is not short.
AGAIN_AFTER_S = 1.0
_came: list[signal.Signals] = []


def hold() -> None:
    """From now on keep these signals in mind instead of dying of them; also undoes what submitit does with them."""
    for signum in HELD:
        signal.signal(signum, _note)


def came() -> tuple[signal.Signals, ...]:
    """What came since `hold`, each once and for the last time."""
    found = tuple(_came)
    _came.clear()
    return found


def _note(signum: int, frame: object) -> None:
    _came.append(signal.Signals(signum))
