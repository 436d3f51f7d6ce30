"""Below an agent, processes leave when the agent says so, not when Slurm does.

At `scancel` and preemption Slurm sends SIGTERM to every process of a step where it tracks them by their parents or groups
(proctrack/linuxproc and pgid, or cgroup with SignalChildrenProcesses), and srun hands it on once more. Obeyed at once, it
would take workers away that frontends, which are asked in the same moment, still need for what they have begun.

So a shielded child has SIGTERM blocked, and so has all that it starts, the processes of an engine included: a mask, unlike
a handler, is inherited. A thread in each of them takes the signal, asks who sent it, and acts on it unless Slurm did. The
agent's own wish is another signal, because of two SIGTERMs that wait the kernel keeps the first only.

A program that is not ours, such as nats-server or etcd, unblocks SIGTERM and ends; the agent starts it again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing import resource_tracker
from pathlib import Path

log = logging.getLogger(__name__)

# What the agent sends to a shielded child. Real-time signals are queued, and nothing else sends this one.
LEAVE = signal.Signals.SIGRTMIN + 7
STEP_DAEMON = "slurmstepd"
_heard_in = 0


def needed(environ: Mapping[str, str]) -> bool:
    """Whether this process is a task of a Slurm step, so that Slurm signals its children too."""
    return "SLURM_STEP_ID" in environ


def block() -> None:
    """From now on SIGTERM waits for `hear`, in this process and in those that it starts; call it before exec."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, LEAVE})


def hear() -> None:
    """Act on SIGTERM unless Slurm sent it, in a process that was started with it blocked; does nothing in another one.

    Where a handler for SIGTERM is installed, SIGINT is raised in its place, which has to mean the same; without one the
    process ends. Call it before other threads are started, and again in a fork.
    """
    global _heard_in
    if _heard_in == os.getpid() or signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        return
    _heard_in = os.getpid()
    threading.Thread(target=_judge, name="shield", daemon=True).start()


def hear_with_multiprocessing() -> None:
    """The same where `multiprocessing` is used: its resource tracker's start would unblock SIGTERM (Python before 3.13)."""
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        resource_tracker.ensure_running()
        block()
    hear()


def slurm_sent(sender: int) -> bool:
    """Whether a signal's sender is Slurm's step daemon; a container with processes of its own sees it as 0."""
    if sender == 0:
        return True
    try:
        return Path(f"/proc/{sender}/comm").read_text().strip() == STEP_DAEMON
    except OSError:
        return False  # it has ended: the agent, whose death tells its children


def _judge() -> None:
    main = threading.main_thread().ident
    assert main is not None  # it runs
    while True:
        told = signal.sigwaitinfo({signal.SIGTERM, LEAVE})
        if told.si_signo == signal.SIGTERM and slurm_sent(told.si_pid):
            log.info("SIGTERM from Slurm: the agent will say when to leave")
        elif signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            signal.raise_signal(signal.SIGTERM)
        else:
            # To the thread that runs handlers: the kernel might choose another one, and nothing would wake this one then.
            signal.pthread_kill(main, signal.SIGINT)
