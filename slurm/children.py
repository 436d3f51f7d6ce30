"""Child processes of an agent: started, watched, stopped and reaped; never orphaned.

Each child leads a process group of its own, so that whatever it starts (an engine's core and workers) can be ended with
it. The kernel sends it SIGTERM when the agent dies; Slurm's own it does not see if it is shielded. Its output goes to a log file. It may report its state in JSON
lines on the file descriptor named by BATON_REPORT_FD.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from launch.errors import ChildError
from slurm import shield, signals

log = logging.getLogger(__name__)

REPORT_FD = "BATON_REPORT_FD"
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SHM = re.compile(r" (/dev/shm/[^\n]+)$", re.MULTILINE)
DELETED = " (deleted)"
_libc = ctypes.CDLL(None, use_errno=True)


class Report(msgspec.Struct):
    """What a child says of itself."""

    state: str
    detail: str = ""


class Child:
    """A running child process."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        log_path: Path,
        scratch: Path,
        shielded: bool = False,
    ) -> None:
        self.name = name
        self.pid = process.pid
        self.log_path = log_path
        self._process = process
        self._scratch = scratch
        self._shielded = shielded
        self._shared_memory: set[str] = set()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.returncode is not None

    async def wait(self) -> int:
        """Exit code of the child; negative is the signal that killed it."""
        return await self._process.wait()

    async def stop(self, grace_s: float) -> int:
        """SIGTERM (or its like), `grace_s` seconds, SIGKILL to its whole group; returns the exit code once nothing is left of it."""
        self.note_shared_memory()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(shield.LEAVE if self._shielded else signal.SIGTERM)
        try:
            code = await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            log.warning("%s did not end within %.0f s of SIGTERM; killing it", self.name, grace_s)
            self.note_shared_memory()
            self.kill()
            code = await self._process.wait()
        await self.clean()
        return code

    def kill(self) -> None:
        """SIGKILL to the whole group, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def clean(self) -> None:
        """End what the child left running in its group, and remove the files and shared memory it left behind."""
        self.note_shared_memory()
        deadline = asyncio.get_running_loop().time() + 10
        while group_alive(self.pid) and asyncio.get_running_loop().time() < deadline:
            self.kill()
            reap_adopted(self.pid)
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._remove_files)

    def _remove_files(self) -> None:
        if self._shared_memory:  # looking at every process takes a while, and what has died waits to be started again
            mapped_elsewhere = set().union(*(mapped_segments(int(pid)) for pid in os.listdir("/proc") if pid.isdigit()))
            for segment in self._shared_memory - mapped_elsewhere:
                with contextlib.suppress(OSError):  # somebody else's, or gone
                    Path(segment).unlink()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def note_shared_memory(self) -> None:
        """Remember the segments of /dev/shm that the group has mapped: killed engines leave them, and no name says whose.

        What another process has mapped as well when the group is gone is not removed.
        """
        for pid in group_members(self.pid):
            self._shared_memory |= mapped_segments(pid)

    def tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        return tail(self.log_path, lines)

    def error(self, code: int) -> ChildError:
        """What to raise when the child ended by itself."""
        return ChildError(self.name, code, self.tail(), str(self.log_path))


async def start(
    name: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    log_path: Path,
    on_report: Callable[[Report], None] | None = None,
    folder: Path | None = None,
    shielded: bool = False,
    stdin: int = asyncio.subprocess.DEVNULL,
) -> Child:
    """Start a child.

    Args:
        name: Name for messages.
        argv: Command; `argv[0]` is found on PATH.
        env: The whole environment of the child; TMPDIR is replaced by a scratch folder that ends with the child.
        log_path: Its output is appended here.
        on_report: Called in the loop with every report.
        folder: Where it runs; None for where we do.
        shielded: Whether it shall not see Slurm's SIGTERM; its program calls `shield.hear`.
        stdin: Descriptor of its standard input; nothing by default.
    """
    scratch = Path(tempfile.mkdtemp(prefix="baton-"))
    read_end, write_end = os.pipe()
    with log_path.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env={**env, "TMPDIR": str(scratch), REPORT_FD: str(write_end)},
            stdin=stdin,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(write_end,),
            cwd=folder,
            start_new_session=True,
            preexec_fn=functools.partial(_prepare, shielded),
        )
    os.close(write_end)
    await _listen(read_end, on_report)
    return Child(name, process, log_path, scratch, shielded)


def become_subreaper() -> None:
    """Adopt the grandchildren whose parent died, so that they can be reaped."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def group_members(group: int) -> list[int]:
    """Processes of a process group, zombies left out."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, pgrp = Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == group and state not in "ZX":
                    found.append(int(entry.name))
    return found


def group_alive(group: int) -> bool:
    """Whether any process of the group still runs."""
    return bool(group_members(group))


def mapped_segments(pid: int) -> set[str]:
    """Files of /dev/shm that a process has mapped, those that were deleted since left out."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return {path for path in SHM.findall(maps) if not path.endswith(DELETED)}


def born(pid: int) -> int | None:
    """When a process started, in the kernel's clock ticks since boot (proc(5), stat field 22); None if it has ended.

    With the pid it names a process for good: a pid alone may belong to another program by now.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def reap_adopted(group: int) -> None:
    """Collect the exit codes of adopted processes of a group."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a file, however large it is."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 400 * lines))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:]) or "(empty log)"


def _prepare(shielded: bool) -> None:
    """Between fork and exec: what the child inherits."""
    if shielded:
        shield.block()
    # Slurm sends its notice of the time limit to every process of a step, and it would end ours in the middle of a request.
    signal.signal(signals.NOTICE, signal.SIG_IGN)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


async def _listen(read_end: int, on_report: Callable[[Report], None] | None) -> None:
    loop = asyncio.get_running_loop()
    pipe = os.fdopen(read_end, "rb", 0)
    await loop.connect_read_pipe(lambda: _Reports(on_report), pipe)


class _Reports(asyncio.Protocol):
    def __init__(self, on_report: Callable[[Report], None] | None) -> None:
        self._on_report = on_report
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._on_report:
                self._on_report(msgspec.json.decode(line, type=Report))


def report(state: str, detail: str = "") -> None:
    """Tell the agent about this process; does nothing where no agent listens."""
    descriptor = os.environ.get(REPORT_FD)
    if descriptor:
        with contextlib.suppress(OSError):  # the agent is gone; its death is noticed elsewhere
            os.write(int(descriptor), msgspec.json.encode(Report(state, detail)) + b"\n")
