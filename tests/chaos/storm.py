"""A deployment under load and faults, from its launch to its end, and what it left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from launch.records import RunDirectory, State
from slurm.children import mapped_segments
from tests.chaos.asks import MODEL, Asks, Supply, recorded
from tests.chaos.clients import Clients, Tally
from tests.chaos.faults import Done, Faults, Ledger
from tests.deployments import Deployment, deployed, processes_of

SAMPLE_S = 5.0
# A process is compared with itself after its first requests; the rest is what allocators and caches may keep.
WARM_S = 20.0
GROWN_DESCRIPTORS = 12
SETTLE_S = 6.0
TELL_S = 60.0
HELD_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is launched and how it is used.

    Attributes:
        shape: The recipe and what is changed in it.
        clients: Requests at once.
        whole_s: What was broken may take this long to come back.
        grown_bytes: A process may hold this much more at the end than when it was warm.
        vllm: Whether the engines are vLLM's.
        abreast: Break a worker of each kind at a time, not one of all: where one takes long to start, the others go on.
        pauses_s: Mean time between two faults on workers, and on all else, is half of this.
        ready_s: The launch may take this long.
    """

    shape: tuple[str, ...]
    clients: int
    whole_s: float
    grown_bytes: int
    vllm: bool = False
    abreast: bool = False
    pauses_s: tuple[float, float] = (4.0, 6.0)
    ready_s: float = 240.0


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
# A start of vLLM takes half a minute of two cores; its processes grow with the shapes that they meet. Few clients and few
# faults on all else leave the cores to the workers that start. With two workers broken at a time a request may lose more
# than the three that it may by default.
VLLM = Setting(
    shape=("+recipe=tiny_2p2d", "frontend.processes=2", "failover.max_attempts=6"),
    clients=3,
    whole_s=300.0,
    grown_bytes=256 << 20,
    vllm=True,
    abreast=True,
    pauses_s=(2.0, 40.0),
    ready_s=600.0,
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
        head = "| fault | times | whole again after its end, median and longest (s) | after its beginning |"
        lines += ["", head, "|---|---|---|---|"]
        for name in sorted(by_fault):
            whole, took = ([getattr(done, field) for done in by_fault[name]] for field in ("whole_s", "took_s"))
            lines.append(f"| {name} | {len(whole)} | {_middle_and_longest(whole)} | {_middle_and_longest(took)} |")
        lines += ["", "| lived through it all | memory (MiB) | descriptors |", "|---|---|---|"]
        for name, (first, last) in sorted(self.longest_lived.items()):
            memory = f"{first.rss_bytes >> 20} to {last.rss_bytes >> 20}"
            lines.append(f"| {name} | {memory} | {first.descriptors} to {last.descriptors} |")
        lines += ["", f"{len(self.problems)} problems", *(f"- {problem}" for problem in self.problems)]
        return "\n".join(lines)


def _middle_and_longest(seconds: list[float]) -> str:
    ranked = sorted(seconds)
    return f"{ranked[len(ranked) // 2]:.1f}, {ranked[-1]:.1f}"


def storm(folder: Path, model: Path, minutes: float, seed: int, setting: Setting = ECHO) -> Report:
    """Launch, ask and break for that long, then stop and look."""
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    asks: Supply = recorded(model, folder, seed, RECORDED) if setting.vllm else Asks(model, seed)
    shape = (*setting.shape, f"model.path=tiny:{model}")
    begun = time.monotonic()
    env = {"TMPDIR": str(scratch)}
    with deployed(folder, *shape, name="storm", env=env, ready_s=setting.ready_s) as running:
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
    faults = Faults(running, seed, setting.whole_s, cores=setting.vllm, abreast=setting.abreast)
    urls = [url.removesuffix("/v1") for url in running.endpoint.urls]
    clients = Clients(asks, urls, running.run.api_key(), faults.ledger.was_down)
    quiet, calm = asyncio.Event(), asyncio.Event()
    watched = Watched()
    async with asyncio.TaskGroup() as group:
        load = group.create_task(clients.run(setting.clients, quiet))
        watch = group.create_task(_watch(running, watched))
        told = group.create_task(_tell(clients.tally, faults.ledger))
        on_workers_s, on_others_s = setting.pauses_s
        breaking = [
            *(group.create_task(faults.run(series, on_workers_s, calm)) for series in faults.on_workers),
            group.create_task(faults.run(faults.on_others, on_others_s, calm)),
        ]
        await asyncio.sleep(60 * minutes)
        calm.set()
        await asyncio.wait(breaking)
        quiet.set()
        await load
        await asyncio.sleep(SETTLE_S)
        watch.cancel()
        told.cancel()
    _look(running, watched.last, watched.segments)
    stays = await asyncio.to_thread(_busy, running) + (await asyncio.to_thread(_held, running) if setting.vllm else [])
    return clients, watched, faults, [*_grown(watched, setting.grown_bytes), *stays]


async def _tell(tally: Tally, ledger: Ledger) -> None:
    """Say now and then how far it is, and at once what must not be: a storm of an hour that is cut short has told that much."""
    begun, told = time.monotonic(), 0.0
    heard = [0, 0]
    while True:
        for index, problems in enumerate((tally.problems, ledger.problems)):
            for problem in problems[heard[index] :]:
                print(f"PROBLEM {problem}", flush=True)
            heard[index] = len(problems)
        passed_s = time.monotonic() - begun
        if passed_s - told >= TELL_S:
            told = passed_s
            ends = ", ".join(f"{count} {end}" for end, count in tally.ends.most_common())
            load = os.getloadavg()[0]
            print(f"{passed_s / 60:.0f} min: {ends}; {len(ledger.done)} faults; load {load:.0f}", flush=True)
        await asyncio.sleep(1)


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
    """Note what each process holds; one that is still starting would seem to grow."""
    job = running.run.job()
    assert job
    ranks = running.run.ranks(job.attempt).items()
    names = {record.pid: f"agent of rank {rank}" for rank, record in ranks}
    members = [(name, member) for _, record in ranks for name, member in record.members.items() if member.pid]
    names |= {member.pid: name for name, member in members}
    starting = {member.pid for _, member in members if member.state is not State.READY}
    for pid, name in names.items():
        if pid not in starting:
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


def _held(running: Deployment) -> list[str]:
    """Members whose engine still holds KV blocks when every lease has ended; an engine counts again with each request."""
    ends = time.monotonic() + HELD_S
    workers = [name for name in running.pids() if name.startswith(("prefill", "decode"))]
    while True:
        for number in range(2 * len(workers)):
            running.client.completions.create(model=MODEL, prompt=f"{number} and now {time.monotonic()}", max_tokens=2)
        held = {name: running.metric(name, "baton_worker_kv_usage_ratio") for name in workers}
        if not any(held.values()) or time.monotonic() > ends:
            return [f"{name} still holds {ratio:.1%} of its KV blocks" for name, ratio in held.items() if ratio]
        time.sleep(1)


def _left(run: RunDirectory, scratch: Path, segments: set[str]) -> list[str]:
    """What is there after the end."""
    found = [f"process {pid} is left: {line}" for pid, line in processes_of(run).items()]
    found += [f"{path} is left" for path in scratch.iterdir()]
    return [*found, *(f"{path} is left" for path in segments if Path(path).exists())]
