"""The run directory: what a deployment leaves on the shared file system for its ranks, its users and their tools.

    plan.yaml, recipe.yaml      what was decided; recipe.yaml (0600) is what the ranks read
    job.json                    how it was submitted: launcher, id, attempt; a copy stays in logs/attempt_<n>/
    control.json      (0600)    where NATS and etcd are, and every secret of the deployment
    head.json                   the rank that leads, once it is not rank 0
    control/                    their configuration and data; client.pem is what etcd knows us by; what frontends knew last
    endpoint.json     (0600)    where to send requests, and the state of the deployment
    api_key           (0600)    the key that clients send
    admin_key         (0600)    the key of operations on workers (`launch.ctl`)
    keys.json         (0600)    hashes of further keys (`launch.keys`)
    ranks/<i>.json              what rank i last said of itself and its members
    stop                        somebody asked for the end
    moved.json                  where requests go from now on, while this deployment drains
    batch_<job>.log             what the batch script said
    preflight/<i>.json          what rank i found on its node before its engines started
    preflight.json              all of them, once all have reported
    extensions/, departures/    who joined and who left while it ran (launch.elastic)
    logs/attempt_<n>/           logs, and life.json: when it started, was ready and ended; `logs/latest` points to the newest
    metrics/targets.json        Prometheus file_sd

Files are written aside and renamed, so a reader sees the old or the new one. Network file systems answer ESTALE when a
file was replaced under a reader: that is tried again. Every record says which attempt it belongs to, so that what an
earlier one left behind is never taken for the present.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from launch.errors import LaunchError, NotFoundError
from launch.plan import Plan
from launch.recipe import Launcher, Recipe

T = TypeVar("T")
SILENT_AFTER_S = 15.0
# What deployments and keys may be called: it becomes a file's name.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
# What a chain has in its folder and a single deployment has not; its links are deployments below `LINKS` (launch.chain).
CHAIN_FILE = "chain.json"
LINKS = "links"
# How the reason begins with which a deployment that ends refuses requests: somebody else may answer them.
STOPPING = "the deployment is stopping"


class State(StrEnum):
    """Where a member is in its life; a rank is as far as the least of its members."""

    QUEUED = "queued"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Phase(StrEnum):
    """The state of the deployment as `endpoint.json` tells it."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    STOPPED = "stopped"

    @property
    def serves(self) -> bool:
        """Whether requests are answered; without the engines of a bad node a deployment is degraded from the first moment on."""
        return self in (Phase.READY, Phase.DEGRADED)


class Job(msgspec.Struct, kw_only=True):
    """How a deployment was submitted; `id` is empty between the decision and the answer of the submission.

    `begin_at` is the moment before which its job was asked not to start, in seconds since the epoch.
    """

    launcher: Launcher
    attempt: int
    id: str
    host: str
    submitted_at: float
    nodes: int = 0
    begin_at: float | None = None


class Life(msgspec.Struct, kw_only=True):
    """What became of an attempt, as its own ranks saw it; times are seconds since the epoch, `how` is for people.

    Without `ended_at` it still runs, or nobody was left to write.
    """

    started_at: float
    ready_at: float | None = None
    ended_at: float | None = None
    how: str = ""


class MemberRecord(msgspec.Struct, kw_only=True):
    """What the agent knows of one child.

    Of an engine over several ranks also which generation of it the member is in, and which it asks for (slurm.together).
    """

    state: State
    since: float
    pid: int = 0
    restarts: int = 0
    detail: str = ""
    generation: int = 0
    asked: int = 0


class RankRecord(msgspec.Struct, kw_only=True):
    """What a rank last said; `heartbeat` is its own clock, in seconds since the epoch.

    `pid` and `born` (the kernel's start time of the process, in clock ticks) name its agent on `host` for good; `step` is
    Slurm's name of the step that it is a task of, where it is one. At the end, `drained` says that its frontends have
    finished, `quiet` that nothing of its members is left, and `ended` that nothing is left at all.
    """

    attempt: int
    rank: int
    host: str
    address: str
    port_base: int
    pid: int
    born: int
    heartbeat: float
    members: dict[str, MemberRecord] = {}
    control_ready_s: float | None = None
    drained: bool = False
    quiet: bool = False
    ended: bool = False
    failure: str | None = None
    step: str = ""


class Control(msgspec.Struct, kw_only=True):
    """Addresses and secrets of the control plane.

    Each list has one entry for each rank that runs a server, in the order of ranks from 0 on; those of what the servers ask
    each other (`nats_routes`, `etcd_peers`) are empty where there is one. A client may ask any of them.

    The CURVE key pairs (Z85 text) are those of every worker's request socket, and of every frontend that connects to one:
    each side proves that it has its own (`workers.runtime.curve`). NATS and etcd are asked over TLS: `authority` (PEM) is who
    signed their certificate, and `client_file` holds ours and its key (`workers.runtime.trust`).
    """

    attempt: int
    nats_urls: list[str]
    nats_user: str
    nats_password: str
    etcd_urls: list[str]
    etcd_user: str
    etcd_password: str
    worker_public: str
    worker_secret: str
    frontend_public: str = ""
    frontend_secret: str = ""
    authority: str = ""
    client_file: str = ""
    nats_routes: list[str] = []
    nats_route_password: str = ""
    etcd_peers: list[str] = []

    @property
    def nats_url(self) -> str:
        """The first NATS server."""
        return self.nats_urls[0]

    @property
    def etcd_url(self) -> str:
        """The first etcd server."""
        return self.etcd_urls[0]


class Head(msgspec.Struct, kw_only=True):
    """The rank that leads an attempt. `term` grows with each that ever led: etcd's revision of its claim."""

    attempt: int
    rank: int
    term: int


class Endpoint(msgspec.Struct, kw_only=True):
    """What a client needs; `expires_at` is seconds since the epoch, or null without a time limit.

    `head` is the rank that published it, in its `term`; `lost` are the ranks that have not been heard for a while.

    All frontends serve `url`. `urls` has for each frontend one that only it serves: for its metrics, and for operators.
    """

    url: str
    urls: list[str]
    models: list[str]
    state: Phase
    api_key_file: str
    expires_at: float | None = None
    head: int = 0
    term: int = 0
    lost: list[int] = []


class ChainEndpoint(Endpoint, kw_only=True):
    """The endpoint of a chain: that of the link that serves."""

    link: int


class RunDirectory:
    """One deployment's folder. Makes paths and reads and writes records; holds no state of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """Name of the deployment: its folder below that of all runs, which for a link of a chain is NAME/links/<n>."""
        parent = self.path.parent
        return f"{parent.parent.name}/{LINKS}/{self.path.name}" if parent.name == LINKS else self.path.name

    @property
    def api_key_file(self) -> Path:
        """The key that clients send."""
        return _shared(self.path / "api_key")

    @property
    def admin_key_file(self) -> Path:
        """The key of operations on workers."""
        return _shared(self.path / "admin_key")

    @property
    def keys_file(self) -> Path:
        """Hashes of further keys; there is none until the first is given out."""
        return _shared(self.path / "keys.json")

    @property
    def stop_file(self) -> Path:
        """Its presence asks the agents to end."""
        return self.path / "stop"

    @property
    def targets_file(self) -> Path:
        """Prometheus file_sd list of every metrics page of the deployment."""
        return self.path / "metrics" / "targets.json"

    def logs(self, attempt: int) -> Path:
        """Folder of the logs of one attempt."""
        return self.path / "logs" / f"attempt_{attempt}"

    def log_of(self, attempt: int, member: str) -> Path:
        """Log of one member, or of a server of the control plane."""
        return self.logs(attempt) / f"{member}.log"

    def attempts(self) -> list[int]:
        """Numbers of all attempts that ever began here, in order."""
        return sorted(int(path.name.removeprefix("attempt_")) for path in (self.path / "logs").glob("attempt_*"))

    def next_attempt(self) -> int:
        """Number of the attempt after all that ever began here."""
        return max(self.attempts(), default=0) + 1

    def prepare(self, recipe: Recipe, plan: Plan, attempt: int) -> None:
        """Make the folder ready for an attempt: write what was decided, remove what the last attempt said.

        Raises:
            FileExistsError: Somebody else has begun this attempt.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.logs(attempt).mkdir(parents=True)
        (self.path / "ranks").mkdir(exist_ok=True)
        self.targets_file.parent.mkdir(exist_ok=True)
        names = ("control.json", "endpoint.json", "head.json", "preflight.json", "moved.json")
        records = [self.path / name for name in names]
        folders = ("preflight", "extensions", "departures")
        said = [path for folder in folders for path in (self.path / folder).glob("*.json")]
        for stale in (self.stop_file, *records, *self._rank_files(), *said):
            stale.unlink(missing_ok=True)
        # The recipe may hold tokens in the engines' environment.
        write(self.path / "recipe.yaml", msgspec.yaml.encode(asdict(recipe)), mode=0o600)
        write(self.path / "plan.yaml", msgspec.yaml.encode(asdict(plan)))
        for file, what in ((self.api_key_file, "baton"), (self.admin_key_file, "baton-admin")):
            if not file.exists():
                write(file, f"{what}-{secrets.token_urlsafe(32)}\n".encode(), mode=0o600)
        _point(self.path / "logs" / "latest", self.logs(attempt).name)

    def recipe(self) -> Recipe:
        """The recipe of the deployment.

        Raises:
            LaunchError: The folder holds none.
        """
        content = read_bytes(self.path / "recipe.yaml")
        if content is None:
            raise LaunchError(f"{self.path} holds no recipe.yaml: it is not the run directory of a deployment")
        return msgspec.yaml.decode(content, type=Recipe)

    def api_key(self) -> str:
        """The key that clients send."""
        return self.api_key_file.read_text().strip()

    def admin_key(self) -> str:
        """The key of operations on workers."""
        return self.admin_key_file.read_text().strip()

    def job(self) -> Job | None:
        """How the deployment was last submitted."""
        return self._read("job.json", Job)

    def control(self) -> Control | None:
        """The control plane of the running attempt, once it serves."""
        return self._read("control.json", Control)

    def head(self, attempt: int) -> Head:
        """Who leads the attempt: the one place that says so."""
        head = self._read("head.json", Head)
        return head if head and head.attempt == attempt else Head(attempt=attempt, rank=0, term=0)

    def endpoint(self) -> Endpoint | None:
        """The endpoint of the running attempt, once the head has published it."""
        return self._read("endpoint.json", Endpoint)

    def link(self) -> int | None:
        """The link that serves, where this is the folder of a chain and one does."""
        endpoint = self._read("endpoint.json", ChainEndpoint)
        return endpoint.link if endpoint else None

    def rank(self, attempt: int, rank: int) -> RankRecord | None:
        """The last word of one rank of an attempt."""
        record = self._read(f"ranks/{rank}.json", RankRecord)
        return record if record and record.attempt == attempt else None

    def ranks(self, attempt: int) -> dict[int, RankRecord]:
        """The last word of every rank of an attempt."""
        records = (self._read(f"ranks/{path.name}", RankRecord) for path in self._rank_files())
        return {record.rank: record for record in records if record and record.attempt == attempt}

    def job_of(self, attempt: int) -> Job | None:
        """How an attempt was submitted, also one that is over."""
        return self._read(f"logs/attempt_{attempt}/job.json", Job)

    def life(self, attempt: int) -> Life | None:
        """What became of an attempt, once it has begun."""
        return self._read(f"logs/attempt_{attempt}/life.json", Life)

    def moved(self) -> str | None:
        """The URL that serves instead of this deployment, where one does."""
        return self._read("moved.json", str)

    def put_job(self, job: Job) -> None:
        """Publish how the deployment was submitted, and keep it with the attempt."""
        write(self.path / "job.json", _json(job))
        if self.logs(job.attempt).is_dir():
            write(self.logs(job.attempt) / "job.json", _json(job))

    def put_life(self, attempt: int, life: Life) -> None:
        """Keep what became of an attempt."""
        write(self.logs(attempt) / "life.json", _json(life))

    def put_moved(self, url: str) -> None:
        """Say where requests go from now on."""
        write(self.path / "moved.json", msgspec.json.encode(url), mode=0o600)

    def put_control(self, control: Control) -> None:
        """Publish the control plane, secrets included."""
        write(self.path / "control.json", _json(control), mode=0o600)

    def put_head(self, head: Head) -> None:
        """Publish who leads."""
        write(self.path / "head.json", _json(head))

    def put_endpoint(self, endpoint: Endpoint) -> None:
        """Publish the endpoint."""
        write(self.path / "endpoint.json", _json(endpoint), mode=0o600)

    def put_rank(self, record: RankRecord) -> None:
        """Publish what a rank says of itself."""
        write(self.path / "ranks" / f"{record.rank}.json", _json(record))

    def put_preflight(self, rank: int | None, content: bytes) -> None:
        """Publish the JSON of what a rank found before its engines started; of all ranks for None."""
        folder = self.path / "preflight"
        folder.mkdir(exist_ok=True)
        write(self.preflight_file if rank is None else folder / f"{rank}.json", content)

    @property
    def preflight_file(self) -> Path:
        """What all ranks found."""
        return self.path / "preflight.json"

    def preflights_written(self) -> int:
        """How many ranks have published what they found."""
        return len(list((self.path / "preflight").glob("*.json")))

    def preflight_of(self, rank: int) -> bytes | None:
        """What a rank found, once it has told."""
        return read_bytes(self.path / "preflight" / f"{rank}.json")

    def preflight(self) -> bytes | None:
        """What all ranks found, once rank 0 has told."""
        return read_bytes(self.preflight_file)

    def preflights(self) -> list[bytes]:
        """What ranks found, of whatever attempt."""
        found = (read_bytes(path) for path in sorted((self.path / "preflight").glob("*.json")))
        return [content for content in found if content is not None]

    def put_targets(self, targets: list[dict[str, Any]]) -> None:
        """Publish the metrics pages in Prometheus' file_sd form."""
        write(self.targets_file, msgspec.json.encode(targets))

    def _read(self, name: str, kind: type[T]) -> T | None:
        content = read_bytes(self.path / name)
        return None if content is None else msgspec.json.decode(content, type=kind)

    def _rank_files(self) -> list[Path]:
        return sorted((self.path / "ranks").glob("*.json"))


def find(runs_dir: Path, name: str) -> RunDirectory:
    """The run directory of a deployment that was launched from here; of a chain that of the link that serves, or will.

    Raises:
        NotFoundError: There is none of that name.
    """
    run = RunDirectory(runs_dir / name)
    if (run.path / CHAIN_FILE).exists():
        serving = run.link()
        run = RunDirectory(run.path / LINKS / str(serving or max(link_numbers(run.path), default=0)))
    if run.job() is None:
        raise NotFoundError(name, str(runs_dir), (path.name for path in every(runs_dir)))
    return run


def every(runs_dir: Path) -> Iterator[Path]:
    """The folders of all deployments and chains that were launched from here."""
    found = {path.parent for name in ("job.json", CHAIN_FILE) for path in runs_dir.glob(f"*/{name}")}
    return iter(sorted(found))


def link_numbers(chain: Path) -> list[int]:
    """The links of a chain that were submitted, in order."""
    folders = (path.parent for path in (chain / LINKS).glob("*/job.json"))
    return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace a file whole: written aside with its final mode, then renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def read_bytes(path: Path, tries: int = 5) -> bytes | None:
    """The content of a file, or None while there is no such file."""
    for left in reversed(range(tries)):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE or not left:
                raise
            time.sleep(0.05)
    return None


def _shared(path: Path) -> Path:
    """Where a file really is: links of a chain have their keys in common, as links to the chain's."""
    return path.resolve() if path.is_symlink() else path


def _json(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record), indent=2)


def _point(link: Path, target: str) -> None:
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)
