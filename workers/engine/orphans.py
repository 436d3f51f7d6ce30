"""No process of an engine outlives its member process.

vLLM's engine core and workers go on for ever when the process that embeds them is killed (vLLM 0.32). So each of them
watches that process and ends with it: forked ones through a fork hook, spawned ones through vLLM's plugin entry point,
which calls `guard` in every process of an engine.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from slurm import shield

GUARDED_PID = "BATON_GUARDED_PID"


def die_with(pid: int) -> None:
    """Make every later child of this process end when `pid` does."""
    os.environ[GUARDED_PID] = str(pid)
    os.register_at_fork(after_in_child=guard)


def guard() -> None:
    """End this process when the guarded one ends; does nothing in the guarded one itself, or where there is none.

    An engine's process is shielded as its member is (`slurm.shield`), and this is where each of them can be told.
    """
    pid = int(os.environ.get(GUARDED_PID, "0"))
    if not pid or pid == os.getpid():
        return
    shield.hear()

    def watch() -> None:
        _wait_for_end(pid)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="orphan-guard", daemon=True).start()


def _wait_for_end(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except OSError:  # Linux before 5.3 has no pidfd
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(1)
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)  # a pidfd becomes readable when its process has ended
    poll.poll()
