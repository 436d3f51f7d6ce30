"""Follow a deployment from outside, by its run directory and by Slurm's own word; end it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch import elastic
from launch.errors import DeploymentError
from launch.progress import Row, rows
from launch.recipe import Launcher
from launch.records import SILENT_AFTER_S, Endpoint, Job, Phase, RankRecord, RunDirectory
from launch.standby import UNCOVERED, control_ranks
from slurm import signals
from slurm.children import born, tail

ENDED_SLURM_STATES = {
    "",
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
}
KILL_AFTER_S = 60.0
ASK_SLURM_S = 3.0
POLL_S = 0.25

# squeue's last answers of this process, by job; see slurm_state.
_said: dict[str, tuple[float, tuple[str | None, str]]] = {}


@dataclass(frozen=True, slots=True)
class View:
    """A deployment as seen from outside at one moment."""

    job: Job
    ranks: dict[int, RankRecord]
    endpoint: Endpoint | None
    rows: list[Row]
    expected: int
    """Ranks of the job; those of the extensions come after them and end before."""
    changes: list[str] = field(default_factory=list)
    """Who joined and who left since, in sentences."""

    @property
    def phase(self) -> Phase:
        """The state of the whole; starting until rank 0 says otherwise."""
        return self.endpoint.state if self.endpoint else Phase.STARTING

    @property
    def failures(self) -> list[str]:
        """What failed, rank by rank."""
        return [record.failure for record in self.launched if record.failure]

    @property
    def failure(self) -> str | None:
        """What went wrong first, if anything did."""
        return next(iter(self.failures), None)

    @property
    def ended(self) -> bool:
        """Whether every rank of the job has said that it ended, those left out that were lost."""
        lost = self.endpoint.lost if self.endpoint else []
        left = [record for record in self.launched if not (record.ended or record.rank in lost)]
        return len(self.launched) == self.expected and not left

    @property
    def launched(self) -> list[RankRecord]:
        """The ranks of the job, as far as they have reported."""
        return [record for rank, record in self.ranks.items() if rank < self.expected]


def look(run: RunDirectory) -> View:
    """How the deployment is now.

    Raises:
        DeploymentError: It was never submitted.
    """
    job = run.job()
    if job is None:
        raise DeploymentError(f"{run.path} has no job.json")
    ranks = run.ranks(job.attempt)
    where = elastic.plan_of(run, run.recipe(), job.attempt)
    return View(job, ranks, run.endpoint(), rows(where, ranks), where.ranks, elastic.told(run, job.attempt))


def where_alive(run: RunDirectory) -> str | None:
    """Where the deployment runs, or None when it has ended or never began."""
    job = run.job()
    if job is None:
        return None
    ranks = run.ranks(job.attempt)
    ended = look(run).ended
    if job.launcher is Launcher.SLURM:
        state, _ = slurm_state(job.id)
        if state is None:  # Slurm does not answer from here: believe what the ranks wrote
            return f"Slurm job {job.id}" if not ended and recently_heard(ranks) else None
        if state in ENDED_SLURM_STATES:
            return _where_joined_alive(run, job, ranks)
        return f"Slurm job {job.id}, {state.lower()}"
    if job.host != socket.gethostname():
        return f"on {job.host}" if not ended and recently_heard(ranks) else None
    alive = [str(record.pid) for record in ranks.values() if born(record.pid) == record.born]
    if not alive and job.launcher in (Launcher.LOCAL, Launcher.ALLOCATION) and is_controller(job.id, run):
        alive = [job.id]
    return f"on this machine, process {alive[0]}" if alive else None


def _where_joined_alive(run: RunDirectory, job: Job, ranks: Mapping[int, RankRecord]) -> str | None:
    """Where a job that joined still runs, when the deployment's own has ended; one that never began is not of it."""
    spans = {span.number: span for span in elastic.plan_of(run, run.recipe(), job.attempt).joined}
    for each in elastic.joinings(run, job.attempt):
        span = spans[each.extension.number]
        begun = {rank: record for rank, record in ranks.items() if rank in span}
        if not each.job or (all(record.ended for record in begun.values()) and not recently_heard(begun)):
            continue
        state, _ = slurm_state(each.job)
        if state is not None and state not in ENDED_SLURM_STATES:
            return f"Slurm job {each.job}, which joined, {state.lower()}"
    return None


def node_notes(run: RunDirectory, view: View) -> list[str]:
    """What there is to say of nodes: which are lost, which rank leads if not the first, and whether that one is covered."""
    recipe = run.recipe()
    leading = control_ranks(recipe, view.job.launcher)
    lost = view.endpoint.lost if view.endpoint else []
    notes = [f"lost: rank {rank} on {view.ranks[rank].host}" for rank in lost if rank in view.ranks]
    head = run.head(view.job.attempt).rank
    if head:
        notes.append(f"rank {head} leads, since rank 0 was lost")
    on_nodes = view.job.launcher in (Launcher.SLURM, Launcher.ALLOCATION) or view.expected > 1
    return notes + ([UNCOVERED] if len(leading) == 1 and on_nodes else [])


def is_over(run: RunDirectory) -> bool:
    """Whether the latest attempt has said itself that it ended, so that nobody else need be asked."""
    job = run.job()
    if job is None:
        return True
    life, ranks = run.life(job.attempt), run.ranks(job.attempt)
    return bool(life and life.ended_at and all(record.ended for record in ranks.values()))


def recently_heard(ranks: dict[int, RankRecord]) -> bool:
    """Whether any rank wrote its record within the last seconds, by its own clock."""
    return any(time.time() - record.heartbeat < SILENT_AFTER_S for record in ranks.values())


def is_controller(pid: str, run: RunDirectory) -> bool:
    """Whether the process is submitit's local controller, or the srun, of this deployment."""
    try:
        return bytes(run.path) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def slurm_state(job_id: str) -> tuple[str | None, str]:
    """State and reason of a job, as squeue said within the last seconds: sites throttle who asks more often.

    ("", "") once Slurm has forgotten the job, (None, "") when squeue does not answer.
    """
    asked, answer = _said.get(job_id, (0.0, (None, "")))
    if not asked or time.monotonic() - asked > ASK_SLURM_S:
        answer = _ask_slurm(job_id)
        _said[job_id] = (time.monotonic(), answer)
    return answer


def _ask_slurm(job_id: str) -> tuple[str | None, str]:
    if not job_id or shutil.which("squeue") is None:
        return None, ""
    command = ["squeue", "--noheader", "--jobs", job_id, "--states=all", "--format=%T|%r|%S"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None, ""
    if answer.returncode:
        return ("", "") if "Invalid job id" in answer.stderr else (None, "")
    state, _, rest = answer.stdout.strip().partition("|")
    reason, _, start = rest.partition("|")
    expected = f", expected to start {start}" if start not in ("", "N/A") else ""
    return state, f"{reason}{expected}" if state == "PENDING" else ""


def request_stop(run: RunDirectory) -> None:
    """Ask the agents to end, by the stop file and, as a network file system may hide that for a while, by a signal.

    A Slurm job that has not started is cancelled.
    """
    run.stop_file.touch()
    job = run.job()
    cancel_extensions(run, f"--signal={signals.STOP.name}")
    if job and job.launcher is Launcher.SLURM:
        pending = not run.ranks(job.attempt) and slurm_state(job.id)[0] == "PENDING"
        cancel(job, *(() if pending else (f"--signal={signals.STOP.name}",)))
    elif job and job.launcher is Launcher.ALLOCATION:
        cancel_steps(run, f"--signal={signals.STOP.name}")


def cancel(job: Job, *flags: str) -> None:
    """scancel a job."""
    subprocess.run(["scancel", *flags, job.id], capture_output=True, timeout=60, check=False)


def cancel_extensions(run: RunDirectory, *flags: str) -> None:
    """scancel the jobs that joined; without flags, or where one has not started, whole."""
    job = run.job()
    for each in elastic.joinings(run, job.attempt) if job and job.launcher is Launcher.SLURM else ():
        if each.job:
            pending = slurm_state(each.job)[0] == "PENDING"
            subprocess.run(
                ["scancel", *(() if pending else flags), each.job], capture_output=True, timeout=60, check=False
            )


def cancel_steps(run: RunDirectory, *flags: str) -> None:
    """scancel the step that the agents run as, where they run inside somebody's allocation; that itself stays."""
    job = run.job()
    steps = {record.step for record in run.ranks(job.attempt).values() if record.step} if job else set()
    for step in steps:
        subprocess.run(["scancel", *flags, step], capture_output=True, timeout=60, check=False)


def signal_agents(run: RunDirectory, signum: signal.Signals) -> None:
    """Send a signal to the agents on this machine."""
    job = run.job()
    for record in run.ranks(job.attempt).values() if job else ():
        ours = record.host == socket.gethostname() and record.pid != os.getpid()
        if ours and born(record.pid) == record.born:
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signum)


def insist(run: RunDirectory) -> None:
    """End a deployment at once that was asked to end before."""
    job = run.job()
    if job and job.launcher is Launcher.SLURM:
        cancel(job)
        cancel_extensions(run)
    elif job and job.launcher is Launcher.ALLOCATION:
        cancel_steps(run)
    else:
        signal_agents(run, signal.SIGTERM)


def stop(run: RunDirectory, timeout_s: float, on_look: Callable[[View], None] = lambda view: None) -> None:
    """Ask for the end and wait for it; after `timeout_s` seconds end it the hard way.

    Raises:
        DeploymentError: It still runs.
    """
    request_stop(run)
    if _until_gone(run, timeout_s, on_look):
        return
    for _ in range(2):  # agents take the first as a request, the second as an order
        insist(run)
        time.sleep(signals.AGAIN_AFTER_S + 0.2)
    if _until_gone(run, KILL_AFTER_S, on_look):
        return
    raise DeploymentError(f"{run.name} still runs: {where_alive(run)}")


def agent_logs(run: RunDirectory, job: Job) -> str:
    """The ends of the agents' own logs, for a deployment that ended without saying why."""
    found = sorted(run.logs(job.attempt).glob("*_log.out"))
    found += [path for path in (run.path / f"batch_{job.id}.log", run.logs(job.attempt) / "srun.out") if path.exists()]
    return "\n".join(f"{path}:\n{tail(path, 12)}" for path in found) or f"no agent wrote to {run.logs(job.attempt)}"


def _until_gone(run: RunDirectory, timeout_s: float, on_look: Callable[[View], None]) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        on_look(look(run))
        if where_alive(run) is None:
            return True
        time.sleep(POLL_S)
    return False
