"""A real Slurm cluster (munged, slurmctld, one slurmd per node) on this machine, for tests.

Everything listens on loopback with private ports, a private munge key and socket, and a private
slurm.conf, so several clusters can run at once and none touches a system-wide Slurm. Needs root,
because slurmd starts tasks as the submitting user and munged guards its key.

Each daemon runs under a small init of its own (this file run as a script, see `_init`), which plays the
part of the machine's process 1: whatever the daemon's descendants do to get away, such as slurmstepd's
double fork or a task's setsid, they stay below that init, so a node's processes can be found and ended
without guessing, and they end even if the test run itself is killed.
"""

from __future__ import annotations

import ctypes
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

GRACE_S = 20
_START_TIMEOUT_S = 60.0
_TERM_GRACE_S = 3.0
_KILL_TIMEOUT_S = 30.0
_CANCEL_GRACE_S = 3.0
_POLL_S = 0.05
_PR_SET_CHILD_SUBREAPER = 36
# Below Linux's ephemeral range (32768 up), so no outgoing connection takes a port between our probe and
# the daemon's own bind.
_PORTS = range(20000, 32000)


@dataclass(slots=True)
class _Daemons:
    """What this module started and must end, each daemon's init, and the facts needed to start one again."""

    conf: Path
    logs: Path
    run_dir: Path
    env: dict[str, str]
    ctld_port: int
    node_ports: dict[str, int]
    slurmds: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    services: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SlurmCluster:
    """A running cluster: partition `main` over all nodes (the default), `short` over the first one only.

    Jobs in `spare` and `spare_requeue` give way to those in `urgent`, which cancel or requeue them after a grace.
    """

    root: Path
    nodes: tuple[str, ...]
    env: dict[str, str]
    _daemons: _Daemons = field(repr=False, compare=False)

    def run(self, *argv: str, timeout_s: float = 60) -> str:
        """Run a Slurm client command against this cluster and return its stdout.

        Raises RuntimeError holding the command's stderr when it exits non-zero, and
        subprocess.TimeoutExpired, with the command killed, when it takes longer than timeout_s.
        """
        done = subprocess.run(
            [_which(argv[0]), *argv[1:]],
            env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)} exited {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def node_state(self, name: str) -> str:
        """Return the node's state as the controller has it now: IDLE, MIXED, DOWN+NOT_RESPONDING, ...

        Asked of scontrol for the one node, because sinfo can go on calling a dead node "mixed*" for as long
        as it is polled: the controller keeps its allocation counts for such lists from an earlier answer.
        """
        out = self.run("scontrol", "show", "node", name)
        return next(word for word in out.split() if word.startswith("State=")).removeprefix("State=")

    def kill_node(self, name: str) -> None:
        """Make the node dead: SIGKILL its slurmd, its slurmstepds and every task below them.

        On return none of them is left. The controller is told nothing; it finds out by its own timeout.
        """
        init = self._daemons.slurmds.pop(name, None)
        if init is None:
            raise ValueError(f"node {name} is not running; running: {sorted(self._daemons.slurmds)}")
        _kill(init)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node that was killed, and return once the controller sees it respond."""
        if name not in self.nodes:
            raise ValueError(f"no node {name}; nodes: {self.nodes}")
        if name in self._daemons.slurmds:
            raise ValueError(f"node {name} is already running")
        _start_slurmd(self._daemons, name)
        _wait_for(self._daemons, f"node {name} to respond", lambda: _responds(self, name))


@contextmanager
def slurm_cluster(
    root: Path,
    *,
    nodes: int = 4,
    cpus: int = 8,
    memory_mb: int = 6000,
    kill_wait_s: int = 10,
    slurmd_timeout_s: int = 20,
    max_jobs: int = 10000,
) -> Iterator[SlurmCluster]:
    """Run a cluster with `nodes` idle nodes n1.. for the length of the block; it takes `max_jobs` jobs, ended ones included.

    Configuration, controller state and logs stay in `root` afterwards; no process of the cluster does,
    jobs included, however the block ends. Raises RuntimeError with the ends of the logs when the cluster
    does not come up.
    """
    names = tuple(f"n{i}" for i in range(1, nodes + 1))
    # Unix socket paths end at 107 bytes and a test's root may be longer than that, so the munge socket and
    # the slurmd spools (which hold the stepds' sockets) go into a short folder of their own.
    run_dir = Path(tempfile.mkdtemp(prefix="slc-", dir="/tmp"))
    try:
        daemons = _prepare(root.resolve(), run_dir, names)
        daemons.conf.write_text(_slurm_conf(daemons, cpus, memory_mb, kill_wait_s, slurmd_timeout_s, max_jobs))
        cluster = SlurmCluster(root.resolve(), names, daemons.env, daemons)
        try:
            _bring_up(cluster)
            yield cluster
        finally:
            _tear_down(cluster)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def _prepare(root: Path, run_dir: Path, names: tuple[str, ...]) -> _Daemons:
    """Make the folders and choose the ports; nothing runs yet."""
    conf, logs = root / "slurm.conf", root / "log"
    for folder in (logs, root / "state", run_dir / "munge", *(run_dir / name for name in names)):
        folder.mkdir(parents=True, exist_ok=True)
    # munged wants the way to its socket open to every local user.
    run_dir.chmod(0o755)
    ctld_port, *node_ports = _free_ports(len(names) + 1)
    env = {"SLURM_CONF": str(conf)}
    return _Daemons(conf, logs, run_dir, env, ctld_port, dict(zip(names, node_ports, strict=True)))


def _free_ports(count: int) -> list[int]:
    """Return distinct TCP ports that nothing listened on a moment ago.

    They are drawn at random, so that two clusters starting together seldom choose the same; when they do,
    the later daemon cannot bind and its cluster fails to start with that in its log.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with closing(socket.socket()) as probe, suppress(OSError):
            # Slurm's own listeners set this too; without it a port in TIME_WAIT looks taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"fewer than {count} free ports in {_PORTS}")


def _slurm_conf(
    daemons: _Daemons, cpus: int, memory_mb: int, kill_wait_s: int, slurmd_timeout_s: int, max_jobs: int
) -> str:
    """Return slurm.conf: no accounting, no cgroups, loopback only, made-up hardware believed."""
    # Slurm compares its SlurmctldHost with the short host name.
    host = socket.gethostname().split(".")[0]
    root, run_dir, names = daemons.conf.parent, daemons.run_dir, list(daemons.node_ports)
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": daemons.ctld_port,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        "AuthInfo": f"socket={_munge_socket(daemons)}",
        "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
        "StateSaveLocation": root / "state",
        "SlurmctldPidFile": run_dir / "slurmctld.pid",
        "SlurmctldLogFile": daemons.logs / "slurmctld.log",
        "SlurmdSpoolDir": f"{run_dir}/%n",
        "SlurmdPidFile": f"{run_dir}/slurmd.%n.pid",
        "SlurmdLogFile": f"{daemons.logs}/slurmd.%n.log",
        "SlurmdParameters": "config_overrides",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        "PropagateResourceLimits": "NONE",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU_Memory",
        # Without a default a job takes all the memory of a node, and no second one fits beside it.
        "DefMemPerCPU": max(1, memory_mb // cpus),
        # By the defaults a batch job waits up to three seconds, and the first ones after a start longer.
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1",
        "JobRequeue": 0,
        "ReturnToService": 2,
        "KillWait": kill_wait_s,
        "SlurmdTimeout": slurmd_timeout_s,
        "MaxJobCount": max_jobs,
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    hardware = f"CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN"
    for name, port in daemons.node_ports.items():
        lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {hardware}")
    limits = "State=UP OverSubscribe=NO"
    lines.append(f"PartitionName=main Nodes={','.join(names)} Default=YES MaxTime=01:00:00 PreemptMode=OFF {limits}")
    lines.append(f"PartitionName=short Nodes={names[0]} MaxTime=00:02:00 PreemptMode=OFF {limits}")
    for name, mode in (("spare", "CANCEL"), ("spare_requeue", "REQUEUE")):
        lines.append(f"PartitionName={name} Nodes={','.join(names)} PreemptMode={mode} GraceTime={GRACE_S} {limits}")
    lines.append(f"PartitionName=urgent Nodes={','.join(names)} PriorityTier=10 PreemptMode=OFF {limits}")
    return "\n".join(lines) + "\n"


def _munge_socket(daemons: _Daemons) -> Path:
    """Return where the private munged listens."""
    return daemons.run_dir / "munge" / "sock"


def _which(program: str) -> str:
    """Return the program's path, looking in the sbin folders too: an ordinary PATH lacks the daemons."""
    search = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin:/sbin"
    found = shutil.which(program, path=search)
    if found is None:
        raise RuntimeError(f"{program} is not installed (looked in {search})")
    return found


def _spawn(daemons: _Daemons, log: str, *argv: str) -> subprocess.Popen[bytes]:
    """Start a daemon under an init of its own, its output going to the named log; return the init."""
    # What a surrounding Slurm job set must not steer this cluster's daemons.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    with (daemons.logs / f"{log}.out").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).resolve()), _which(argv[0]), *argv[1:]],
            env={**inherited, **daemons.env},
            cwd=daemons.run_dir,
            # Never written to: its closing tells the init that we are gone.
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            # A Ctrl-C at the terminal is for the test run, which then ends the daemons in order.
            start_new_session=True,
        )


def _bring_up(cluster: SlurmCluster) -> None:
    """Start every daemon and return once all nodes are idle."""
    daemons = cluster._daemons
    _start_munged(daemons)
    _wait_for(daemons, "munged to listen", lambda: _accepts(socket.AF_UNIX, str(_munge_socket(daemons))))
    # The slurmds need not wait for the controller's socket: their registration retries. Waiting here is
    # faster all the same, because the retry sleeps.
    daemons.services["slurmctld"] = _spawn(daemons, "slurmctld", "slurmctld", "-D", "-c", "-f", str(daemons.conf))
    listening = ("127.0.0.1", daemons.ctld_port)
    _wait_for(daemons, "slurmctld to listen", lambda: _accepts(socket.AF_INET, listening))
    for name in cluster.nodes:
        _start_slurmd(daemons, name)
    _wait_for(daemons, "all nodes to be idle", lambda: _states(cluster) == dict.fromkeys(cluster.nodes, "idle"))


def _start_munged(daemons: _Daemons) -> None:
    """Start a munged with a fresh key that only this cluster knows."""
    folder = daemons.run_dir / "munge"
    key = folder / "key"
    # Opened with its final mode: munged refuses a key that others could have read.
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(128))
    daemons.services["munged"] = _spawn(
        daemons,
        "munged",
        "munged",
        "--foreground",
        # Turns complaints about who may write to the folders above (a container's /tmp) into warnings.
        "--force",
        f"--socket={_munge_socket(daemons)}",
        f"--key-file={key}",
        f"--log-file={folder / 'log'}",
        f"--pid-file={folder / 'pid'}",
        f"--seed-file={folder / 'seed'}",
    )


def _start_slurmd(daemons: _Daemons, name: str) -> None:
    """Start the slurmd of one node, without waiting for it."""
    daemons.slurmds[name] = _spawn(daemons, f"slurmd.{name}", "slurmd", "-D", "-N", name, "-f", str(daemons.conf))


def _accepts(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    """Say whether something accepts connections at the address."""
    with closing(socket.socket(family)) as probe:
        probe.settimeout(1)
        return probe.connect_ex(address) == 0


def _states(cluster: SlurmCluster) -> dict[str, str]:
    """Return each node's state as sinfo words it, or nothing while the controller does not answer."""
    try:
        out = cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", timeout_s=15)
    except (RuntimeError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split(maxsplit=1) for line in out.splitlines())


def _responds(cluster: SlurmCluster, name: str) -> bool:
    """Say whether the node listens and the controller counts it as up."""
    if not _accepts(socket.AF_INET, ("127.0.0.1", cluster._daemons.node_ports[name])):
        return False
    try:
        state = cluster.node_state(name)
    except (RuntimeError, subprocess.TimeoutExpired):
        return False
    return not any(word in state for word in ("DOWN", "UNKNOWN", "NOT_RESPONDING"))


def _wait_for(daemons: _Daemons, what: str, ready: Callable[[], bool]) -> None:
    """Return once `ready` holds; raise RuntimeError with the logs' ends if it takes too long or a daemon ends."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not ready():
        running = {**daemons.services, **daemons.slurmds}
        ended = {name: child.returncode for name, child in running.items() if child.poll() is not None}
        if ended or time.monotonic() > deadline:
            why = f"ended with {ended}" if ended else f"not after {_START_TIMEOUT_S:.0f} s"
            raise RuntimeError(f"waiting for {what}: {why}\n{_log_tails(daemons)}")
        time.sleep(_POLL_S)


def _log_tails(daemons: _Daemons, lines: int = 15) -> str:
    """Return the last lines of every log of the cluster, each under its file name."""
    tails: list[str] = []
    for log in [*sorted(daemons.logs.iterdir()), daemons.run_dir / "munge" / "log"]:
        if log.is_file() and log.stat().st_size:
            tails.append(f"== {log.name}")
            tails += log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(tails)


def _tear_down(cluster: SlurmCluster) -> None:
    """Cancel every job, end every daemon and whatever the jobs left behind, and reap our children."""
    daemons = cluster._daemons
    try:
        _cancel_all(cluster)
    finally:
        _end(daemons.slurmds.values())
        # munged last: the others cannot say goodbye without it.
        for name in ("slurmctld", "munged"):
            _end(init for service, init in daemons.services.items() if service == name)


def _cancel_all(cluster: SlurmCluster) -> None:
    """Cancel all jobs and give them a moment to end by themselves; a controller that fails is no error here."""
    controller = cluster._daemons.services.get("slurmctld")
    # Without a controller the clients would retry for many seconds.
    if controller is None or controller.poll() is not None or not cluster._daemons.slurmds:
        return
    with suppress(RuntimeError, subprocess.TimeoutExpired):
        jobs = cluster.run("squeue", "-h", "-o", "%A", timeout_s=10).split()
        if jobs:
            cluster.run("scancel", *sorted(set(jobs)), timeout_s=10)
        deadline = time.monotonic() + _CANCEL_GRACE_S
        while jobs and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            jobs = cluster.run("squeue", "-h", "-o", "%A", timeout_s=10).split()


def _end(inits: Iterable[subprocess.Popen[bytes]]) -> None:
    """End and reap daemons: SIGTERM first, and SIGKILL to one that is still there after the grace.

    What is left below a daemon's init when the daemon is gone gets SIGKILL at once.
    """
    waiting = list(inits)
    for init in waiting:
        # The init hands it on to its daemon and sees to the rest.
        init.terminate()
    deadline = time.monotonic() + _TERM_GRACE_S
    for init in waiting:
        with suppress(subprocess.TimeoutExpired):
            init.wait(max(0.0, deadline - time.monotonic()))
        _kill(init)


def _kill(init: subprocess.Popen[bytes]) -> None:
    """SIGKILL everything below the init, which ends it, and reap it."""
    if init.poll() is None:
        _kill_below(init.pid)
    if init.stdin is not None:
        init.stdin.close()
    try:
        init.wait(_KILL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        init.kill()
        init.wait()


def _kill_below(pid: int) -> None:
    """SIGKILL all descendants of the process, until none is left.

    A machine that loses power loses all at once. So they are stopped first, parents before children: no stepd reports the
    death of a task. Then they are killed, children first: no srun outlives its stepd, for it would end the tasks on other nodes.
    """
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    # Again until nothing is found: a task may fork between our look at /proc and the signal.
    while below := _descendants(pid):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes below {pid} survive SIGKILL: {below}")
        for signum, order in ((signal.SIGSTOP, below), (signal.SIGKILL, below[::-1])):
            for descendant in order:
                with suppress(ProcessLookupError):
                    os.kill(descendant, signum)
        time.sleep(_POLL_S / 5)


def _descendants(pid: int) -> list[int]:
    """Return the live processes below this one, level by level, on each level by rising pid.

    So a daemon comes before its slurmstepds and those before their tasks.
    """
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    level = [pid]
    while level:
        level = [child for parent in level for child in sorted(children.get(parent, []))]
        found += level
    return found


def _parents() -> dict[int, int]:
    """Return every live process with its parent; zombies are left out, since no signal ends those."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        # A process may end while we read it.
        with suppress(OSError):
            if entry.name.isdigit():
                # The name in brackets may itself hold brackets and spaces, so count from the last one.
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(entry.name)] = int(parent)
    return parents


def _init(argv: list[str]) -> int:
    """Run one daemon as a machine's process 1 would, and return its exit status once nothing is left below.

    Adopts and reaps every orphan; hands SIGTERM on to the daemon and kills what the daemon leaves behind
    then; and kills everything when the process that started it goes away.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    daemon = os.posix_spawn(
        argv[0], argv, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
    )
    # By descriptor, because the daemon's pid may belong to another process once it has been reaped.
    handle = os.pidfd_open(daemon)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: _stop(stopping, handle))
    threading.Thread(target=_kill_when_orphaned, daemon=True).start()
    status = 0
    while True:
        try:
            pid, ended = os.wait()
        except ChildProcessError:
            return status
        if pid == daemon:
            status = os.waitstatus_to_exitcode(ended) & 0xFF
            if stopping.is_set():
                _kill_below(os.getpid())


def _stop(stopping: threading.Event, daemon: int) -> None:
    """Note that the daemon is to stop, and send SIGTERM to it, by its descriptor, if it still runs."""
    stopping.set()
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(daemon, signal.SIGTERM)


def _kill_when_orphaned() -> None:
    """Wait until our starter's end of the pipe closes, then kill everything below this process."""
    while os.read(0, 1):
        pass
    _kill_below(os.getpid())


if __name__ == "__main__":
    sys.exit(_init(sys.argv[1:]))
