"""A deployment under load and faults, from its launch to its end, and what it left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from launch.records import RunDirectory
from slurm.children import mapped_segments
from tests.chaos.asks import Asks, Supply, recorded
from tests.chaos.clients import Clients, Tally
from tests.chaos.faults import Done, Faults, Ledger
from tests.deployments import Deployment, deployed, processes_of

SAMPLE_S = 5.0
# A process is compared with itself after its first requests; the rest is what allocators and caches may keep.
WARM_S = 20.0
GROWN_DESCRIPTORS = 12
SETTLE_S = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is launched and how it is used.

    Attributes:
        shape: The recipe and what is changed in it.
        clients: Requests at once.
        whole_s: What was broken may take this long to come back.
        grown_bytes: A process may hold this much more at the end than when it was warm.
        vllm: Whether the engines are vLLM's.
    """

    shape: tuple[str, ...]
    clients: int
    whole_s: float
    grown_bytes: int
    vllm: bool = False


ECHO = Setting(
    shape=(
        "+recipe=tiny_2p2d",
        "engine.backend=echo",
        "engine.echo_interval_s=0.02",
        "roles.prefill.replicas=2",
        "roles.decode.replicas=3",
        "frontend.processes=2",
        "cluster.cpu_engines_per_node=3",
    ),
    clients=12,
    # What dies again and again is started after up to 30 s, and starts slowly on a busy machine.
    whole_s=90.0,
    grown_bytes=48 << 20,
)
# A start of vLLM takes half a minute of two cores; its processes grow with the shapes that they meet.
VLLM = Setting(
    shape=("+recipe=tiny_2p2d", "frontend.processes=2"),
    clients=4,
    whole_s=300.0,
    grown_bytes=256 << 20,
    vllm=True,
)
RECORDED = 200


@dataclass(slots=True)
class Sample:
    """What a process holds."""

    name: str
    rss_bytes: int
    descriptors: int


@dataclass(slots=True)
class Watched:
    """What the processes of the deployment held, over time."""

    first: dict[int, Sample] = field(default_factory=dict)
    last: dict[int, Sample] = field(default_factory=dict)
    segments: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Report:
    """What happened."""

    seed: int
    seconds: float
    tally: Tally
    ledger: Ledger
    leaks: list[str]
    longest_lived: dict[str, tuple[Sample, Sample]]

    @property
    def problems(self) -> list[str]:
        """Everything that must not be."""
        return [*self.tally.problems, *self.ledger.problems, *self.leaks]

    def table(self) -> str:
        """For people."""
        ends = ", ".join(f"{count} {end}" for end, count in self.tally.ends.most_common())
        lines = [
            f"seed {self.seed}, {self.seconds / 60:.1f} minutes",
            f"requests: {ends}; {self.tally.retried} retried",
        ]
        lines.append(f"longest gap within a stream: {self.tally.longest_gap_s:.1f} s")
        by_fault: dict[str, list[Done]] = defaultdict(list)
        for done in self.ledger.done:
            by_fault[done.fault].append(done)
        lines += ["", "| fault | times | whole again after, median and longest (s) |", "|---|---|---|"]
        for name in sorted(by_fault):
            whole = sorted(done.whole_s for done in by_fault[name])
            lines.append(f"| {name} | {len(whole)} | {whole[len(whole) // 2]:.1f}, {whole[-1]:.1f} |")
        lines += ["", "| lived through it all | memory (MiB) | descriptors |", "|---|---|---|"]
        for name, (first, last) in sorted(self.longest_lived.items()):
            memory = f"{first.rss_bytes >> 20} to {last.rss_bytes >> 20}"
            lines.append(f"| {name} | {memory} | {first.descriptors} to {last.descriptors} |")
        lines += ["", f"{len(self.problems)} problems", *(f"- {problem}" for problem in self.problems)]
        return "\n".join(lines)


def storm(folder: Path, model: Path, minutes: float, seed: int, setting: Setting = ECHO) -> Report:
    """Launch, ask and break for that long, then stop and look."""
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    asks: Supply = recorded(model, folder, seed, RECORDED) if setting.vllm else Asks(model, seed)
    shape = (*setting.shape, f"model.path=tiny:{model}")
    begun = time.monotonic()
    with deployed(folder, *shape, name="storm", env={"TMPDIR": str(scratch)}) as running:
        report = asyncio.run(_storm(running, setting, asks, minutes, seed))
        segments = report[1].segments
    tally, ledger = report[0].tally, report[2].ledger
    leaks = [*report[3], *_left(running.run, scratch, segments)]
    first, last = report[1].first, report[1].last
    lived = {last[pid].name: (first[pid], last[pid]) for pid in first.keys() & last.keys()}
    return Report(seed, time.monotonic() - begun, tally, ledger, leaks, lived)


async def _storm(
    running: Deployment, setting: Setting, asks: Supply, minutes: float, seed: int
) -> tuple[Clients, Watched, Faults, list[str]]:
    faults = Faults(running, seed, setting.whole_s, cores=setting.vllm)
    urls = [url.removesuffix("/v1") for url in running.endpoint.urls]
    clients = Clients(asks, urls, running.run.api_key(), faults.ledger.was_down)
    quiet, calm = asyncio.Event(), asyncio.Event()
    watched = Watched()
    async with asyncio.TaskGroup() as group:
        load = group.create_task(clients.run(setting.clients, quiet))
        watch = group.create_task(_watch(running, watched))
        breaking = [
            group.create_task(faults.run(faults.on_workers, 4.0, calm)),
            group.create_task(faults.run(faults.on_others, 6.0, calm)),
        ]
        await asyncio.sleep(60 * minutes)
        calm.set()
        await asyncio.wait(breaking)
        quiet.set()
        await load
        await asyncio.sleep(SETTLE_S)
        watch.cancel()
    _look(running, watched.last, watched.segments)
    return clients, watched, faults, [*_grown(watched, setting.grown_bytes), *await asyncio.to_thread(_busy, running)]


async def _watch(running: Deployment, watched: Watched) -> None:
    """Note what each process held when it was warm."""
    begun = time.monotonic()
    while True:
        seen: dict[int, Sample] = {}
        _look(running, seen, watched.segments)
        if time.monotonic() - begun > WARM_S and not watched.first:
            watched.first = seen
        await asyncio.sleep(SAMPLE_S)


def _look(running: Deployment, samples: dict[int, Sample], segments: set[str]) -> None:
    job = running.run.job()
    assert job
    names = {pid: name for name, pid in running.pids().items()}
    names |= {record.pid: f"agent of rank {rank}" for rank, record in running.run.ranks(job.attempt).items()}
    for pid, name in names.items():
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors = len(os.listdir(f"/proc/{pid}/fd"))
            samples[pid] = Sample(name, pages * os.sysconf("SC_PAGE_SIZE"), descriptors)
        segments |= mapped_segments(pid)


def _grown(watched: Watched, limit: int) -> list[str]:
    found = []
    for pid in watched.first.keys() & watched.last.keys():
        before, after = watched.first[pid], watched.last[pid]
        if after.rss_bytes - before.rss_bytes > limit and after.name not in ("nats", "etcd"):
            found.append(f"{after.name} grew from {before.rss_bytes >> 20} to {after.rss_bytes >> 20} MiB")
        if after.descriptors - before.descriptors > GROWN_DESCRIPTORS:
            found.append(f"{after.name} went from {before.descriptors} to {after.descriptors} descriptors")
    return found


def _busy(running: Deployment) -> list[str]:
    """Members that still serve something, when nobody asks any more."""
    found = []
    for name in running.pids():
        if name.startswith(("prefill", "decode")):
            streams = running.metric(name, "baton_worker_streams")
        elif name.startswith("frontend"):
            streams = running.metric(name, "baton_frontend_active_requests") - 1  # the one that asks
        else:
            continue
        if streams > 0:
            found.append(f"{name} still has {streams:.0f} requests")
    return found


def _left(run: RunDirectory, scratch: Path, segments: set[str]) -> list[str]:
    """What is there after the end."""
    found = [f"process {pid} is left: {line}" for pid, line in processes_of(run).items()]
    found += [f"{path} is left" for path in scratch.iterdir()]
    return [*found, *(f"{path} is left" for path in segments if Path(path).exists())]
