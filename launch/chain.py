"""A chain: one service as a row of jobs, each a whole deployment of its own. What is decided about it, and its folder.

    runs/NAME/chain.json        what was asked for, and the words that made the recipe
    runs/NAME/endpoint.json     the endpoint of the link that serves: what clients, the gateway and `launch.connect` follow
    runs/NAME/api_key, ...      the keys of all links
    runs/NAME/stop              the chain ends: no further link
    runs/NAME/trouble.json      why the next link could not be submitted, while that is so
    runs/NAME/links/<n>/        the run directory of link n

One writer for `endpoint.json`: the link with the highest number among those that were ever ready. A link that is replaced sees
a higher number than its own there and never writes again; should both write in one moment, the newer one sees it and repeats
itself. Nothing in a link's own records knows of the chain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import msgspec

from launch.errors import ConfigError
from launch.recipe import Handover, Launcher
from launch.records import (
    CHAIN_FILE,
    LINKS,
    ChainEndpoint,
    Endpoint,
    Phase,
    RunDirectory,
    link_numbers,
    read_bytes,
    write,
)

UNTIL = "until:"
KEYS = ("api_key", "admin_key", "keys.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How long a chain is: so many links, or as many as it takes until a moment (seconds since the epoch)."""

    links: int | None = None
    until: float | None = None

    def __str__(self) -> str:
        if self.until is not None:
            return f"until {datetime.fromtimestamp(self.until):%Y-%m-%d %H:%M}"
        return f"of {self.links} links"


class ChainRecord(msgspec.Struct, kw_only=True):
    """What was asked for; `first` is the number of its first link, as earlier chains of the name have left theirs."""

    links: int | None
    until: float | None
    launcher: Launcher
    words: tuple[str, ...]
    first: int
    begun_at: float

    @property
    def length(self) -> Length:
        """How long it is to be."""
        return Length(links=self.links, until=self.until)


class Trouble(msgspec.Struct, kw_only=True):
    """Why a link could not be submitted, and when its job was to begin; None for at once."""

    link: int
    message: str
    at: float
    begin_at: float | None = None


class Ending(StrEnum):
    """Why a link ends."""

    STOPPED = "stopped"
    REPLACED = "replaced"
    DATE = "its date has come"
    LIMIT = "time limit"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    FAILED = "failed"
    ASKED = "asked to end"


def parsed(value: object) -> Length | None:
    """The length that a user wrote: a number, or `until:` and a date (local time unless it names a zone); None for none.

    Raises:
        ConfigError: It is neither.
    """
    if value is None:
        return None
    text = str(value)
    if text.startswith(UNTIL):
        try:
            return Length(until=datetime.fromisoformat(text.removeprefix(UNTIL)).timestamp())
        except ValueError:
            pass
    elif text.isdigit() and int(text) > 0:
        return Length(links=int(text))
    raise ConfigError(f"chain is a number of links or until:<date>, as in chain=until:2026-12-01T08:00, got {text!r}")


def goes_on(length: Length, position: int, ends_at: float | None, now: float) -> bool:
    """Whether a chain has another link after this one.

    Args:
        length: Its length.
        position: Place of the link, from 1.
        ends_at: When Slurm ends the link's job; None where nobody does.
        now: The time.
    """
    if length.links is not None:
        return position < length.links
    assert length.until is not None
    return now < length.until and (ends_at is None or ends_at < length.until)


def goes_on_after(ending: Ending, was_ready: bool) -> bool:
    """Whether a link that ends without a successor gets one at once.

    Who cancels a job, or asks it to end, means it. A link that fails before it ever served would fail again.
    """
    if ending is Ending.FAILED:
        return was_ready
    return ending in (Ending.PREEMPTED, Ending.LIMIT)


def begins_at(
    ends_at: float, notice_s: float, handover: Handover, load_s: float, waited_s: float, time_min: int
) -> float:
    """When the next link's job may begin, in seconds since the epoch: as late as it can, for nodes cost.

    It has to be ready, with a margin, when the link before it still has its grace and all of its time to drain. Before that
    it loads for as long as the last one did, and before that it waits for nodes, for which it is given as long as the last one
    waited, up to a quarter of the time limit.

    Args:
        ends_at: When Slurm ends the link that serves.
        notice_s: Seconds before that at which it stops to admit.
        handover: The user's choices.
        load_s: Seconds from the last link's start to its first answer.
        waited_s: Seconds that it was in the queue after it might have begun.
        time_min: Its time limit.
    """
    queue_s = min(waited_s, time_min * 60 / 4) if handover.queue_s is None else handover.queue_s
    return ends_at - notice_s - handover.grace_s - handover.margin_s - load_s - queue_s


def minutes(time_min: int, shortest_min: int, length: Length, begins: float) -> int:
    """The time limit of a link that begins at `begins`: not much longer than its chain."""
    if length.until is None:
        return time_min
    return max(shortest_min, min(time_min, math.ceil((length.until - begins) / 60)))


def to_publish(own: Endpoint, number: int, published: ChainEndpoint | None) -> ChainEndpoint | None:
    """What the chain's endpoint has to become by the word of link `number`, or None to leave it as it is."""
    wanted = ChainEndpoint(**msgspec.structs.asdict(own), link=number)
    if published is None:
        return wanted
    if published.link == number:
        return wanted if wanted != published else None
    if published.link > number:
        return None
    # One that has ended leaves a gap, and who waits for the next is told of it from its start.
    gone = published.state is Phase.STOPPED and own.state is not Phase.STOPPED
    return wanted if gone or own.state.serves else None


def ending(
    *,
    asked: bool,
    replaced: bool,
    dated: bool,
    stopping: bool,
    job: Mapping[str, str],
    ends_at: float | None,
    now: float,
) -> Ending:
    """Why a link ends.

    Args:
        asked: Its or the chain's stop file is there.
        replaced: Another link serves.
        dated: The chain's date has come.
        stopping: It was asked to end, by whatever; otherwise it ends by itself.
        job: What Slurm says of its job (`scontrol show job`), empty where it says nothing.
        ends_at: When Slurm ends it, at the latest at which everything needs to finish.
        now: The time.
    """
    preempted = job.get("PreemptTime", "None") not in ("None", "Unknown") or "PREEMPTED" in job.get("JobState", "")
    if asked:
        return Ending.STOPPED
    if replaced:
        return Ending.REPLACED
    if dated:
        return Ending.DATE
    if preempted:
        return Ending.PREEMPTED
    if not stopping:
        return Ending.FAILED
    if job.get("JobState", "") in ("COMPLETING", "CANCELLED"):
        return Ending.CANCELLED
    return Ending.LIMIT if ends_at is not None and now >= ends_at else Ending.ASKED


class Chain:
    """A chain's folder; makes paths and reads and writes records, and holds no state of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """Name of the chain."""
        return self.path.name

    @property
    def stop_file(self) -> Path:
        """Its presence ends the chain."""
        return self.path / "stop"

    def record(self) -> ChainRecord | None:
        """What was asked for, or None where this is no chain."""
        content = read_bytes(self.path / CHAIN_FILE)
        return None if content is None else msgspec.json.decode(content, type=ChainRecord)

    def link(self, number: int) -> RunDirectory:
        """The run directory of a link, which may not be there yet."""
        return RunDirectory(self.path / LINKS / str(number))

    def numbers(self) -> list[int]:
        """The links that were submitted and belong to the chain as it was last asked for."""
        record = self.record()
        return [number for number in link_numbers(self.path) if record and number >= record.first]

    def endpoint(self) -> ChainEndpoint | None:
        """The endpoint of the link that serves, or served last."""
        content = read_bytes(self.path / "endpoint.json")
        return None if content is None else msgspec.json.decode(content, type=ChainEndpoint)

    def trouble(self) -> Trouble | None:
        """Why the next link could not be submitted."""
        content = read_bytes(self.path / "trouble.json")
        return None if content is None else msgspec.json.decode(content, type=Trouble)

    def begin(self, record: ChainRecord) -> None:
        """Make the folder ready for a new chain, of which no link is there yet."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in (self.stop_file, self.path / "endpoint.json", self.path / "trouble.json"):
            stale.unlink(missing_ok=True)
        write(self.path / CHAIN_FILE, msgspec.json.format(msgspec.json.encode(record), indent=2), mode=0o600)

    def make_link(self, number: int) -> RunDirectory:
        """The folder of a link, with the chain's keys in it."""
        run = self.link(number)
        run.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for key in KEYS:
            if not (run.path / key).is_symlink():
                (run.path / key).symlink_to(Path("../..") / key)
        return run

    def put_endpoint(self, endpoint: ChainEndpoint) -> None:
        """Switch clients to a link, or tell them how it is."""
        write(self.path / "endpoint.json", msgspec.json.format(msgspec.json.encode(endpoint), indent=2), mode=0o600)

    def put_trouble(self, trouble: Trouble | None) -> None:
        """Say why the next link could not be submitted, or that it was."""
        if trouble is None:
            (self.path / "trouble.json").unlink(missing_ok=True)
        else:
            write(self.path / "trouble.json", msgspec.json.encode(trouble))


def chain_of(run: RunDirectory) -> tuple[Chain, int] | None:
    """The chain that a deployment is a link of, and its number; None where it stands alone."""
    folder = run.path.parent
    if folder.name != LINKS or not run.path.name.isdigit() or not (folder.parent / CHAIN_FILE).exists():
        return None
    return Chain(folder.parent), int(run.path.name)
