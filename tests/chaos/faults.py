"""Faults: what is done to the processes and connections of a running deployment, and how long it takes to be whole again.

The first member of each kind is never killed, only frozen and cut off: it shows what a long life leaks, and that somebody
is always there to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import aiohttp

from launch.records import RunDirectory, State
from tests.deployments import Deployment, children
from workers.runtime.etcd import Etcd, EtcdError
from workers.runtime.registry import prefix

POLL_S = 0.1


@dataclass(slots=True)
class Done:
    """One fault: its name, its victim, and the seconds from its end until the deployment was whole."""

    fault: str
    victim: str
    whole_s: float


@dataclass(slots=True)
class Ledger:
    """What was done, and until when each frontend was last down (infinity while it is)."""

    done: list[Done] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    down: dict[str, float] = field(default_factory=dict)

    def was_down(self, url: str, since: float) -> bool:
        """Whether this frontend was down at any moment since then."""
        return self.down.get(url, -math.inf) >= since


class Faults:
    """The faults that can be done to one deployment, at random moments and to random victims."""

    def __init__(self, running: Deployment, seed: int, whole_s: float = 90.0, cores: bool = False) -> None:
        """Make them; `cores` are vLLM's engine cores, which then are broken too."""
        self.ledger = Ledger()
        self._running = running
        self._whole_s = whole_s
        self._rng = random.Random(seed)
        self._workers = [name for name in running.pids() if name.startswith(("prefill", "decode", "aggregated"))]
        self._urls = [url.removesuffix("/v1") for url in running.endpoint.urls]
        self._killable = [name for name in self._workers if not name.endswith("-0")]
        self.on_workers: dict[str, Callable[[], Awaitable[str]]] = {
            "kill a worker": self._kill_worker,
            "stop a worker with SIGTERM": self._terminate_worker,
            "freeze a worker": self._freeze_worker,
        }
        if cores:
            self.on_workers["kill an engine core"] = self._kill_core
            self.on_workers["freeze an engine core"] = self._freeze_core
        if can_cut():
            self.on_workers["cut the connections of a worker"] = self._cut_worker
        self.on_others: dict[str, Callable[[], Awaitable[str]]] = {
            "kill NATS": lambda: self._kill("nats"),
            "kill etcd": lambda: self._kill("etcd"),
            "kill NATS and etcd": lambda: self._kill("nats", "etcd"),
            "wipe etcd's data": self._wipe_etcd,
            "freeze NATS": lambda: self._freeze("nats"),
            "freeze etcd": lambda: self._freeze("etcd"),
            "kill a frontend": self._kill_frontend,
            "freeze a frontend": self._freeze_frontend,
            "pause everything": self._pause,
        }

    async def run(self, faults: dict[str, Callable[[], Awaitable[str]]], pause_s: float, stop: asyncio.Event) -> None:
        """Do one after the other, each in its turn of a random order, until `stop` is set."""
        order: list[str] = []
        while not stop.is_set():
            order = order or self._rng.sample(list(faults), len(faults))
            await self.do(order.pop())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rng.random() * pause_s):
                    await stop.wait()

    async def do(self, name: str) -> Done:
        """Do one fault by its name, and wait until what it could break is whole."""
        fault = self.on_workers.get(name) or self.on_others[name]
        victim = await fault()
        whole_s = await self._whole(f"{name} ({victim})", name in self.on_workers)
        done = Done(name, victim, whole_s)
        self.ledger.done.append(done)
        return done

    # --- what is done -----------------------------------------------------------------------------------------------

    async def _kill_worker(self) -> str:
        return await self._kill(self._rng.choice(self._killable))

    async def _terminate_worker(self) -> str:
        return await self._kill(self._rng.choice(self._killable), signum=signal.SIGTERM)

    async def _kill(self, *victims: str, signum: int = signal.SIGKILL) -> str:
        before = self._running.pids()
        for victim in victims:
            os.kill(before[victim], signum)
        await self._until(lambda: all(self._reborn(victim, before[victim]) for victim in victims), " ".join(victims))
        return " and ".join(victims)

    async def _kill_core(self) -> str:
        """The worker notices, and ends for its agent to start it again."""
        victim = self._rng.choice(self._killable)
        before = self._running.pids()[victim]
        os.kill(self._core(victim), signal.SIGKILL)
        await self._until(lambda: self._reborn(victim, before), victim)
        return victim

    async def _freeze_core(self) -> str:
        victim = self._rng.choice(self._workers)
        with frozen([self._core(victim)]):
            await asyncio.sleep(self._rng.choice((0.5, 3.0, 12.0)))
        return victim

    async def _freeze_worker(self) -> str:
        return await self._freeze(self._rng.choice(self._workers))

    async def _freeze(self, victim: str) -> str:
        with frozen([self._running.pids()[victim]]):
            await asyncio.sleep(self._rng.choice((0.5, 3.0, 7.0)))
        return victim

    async def _pause(self) -> str:
        """As when a laptop is closed: every process of the deployment that serves, at once, longer than any timeout."""
        with frozen(list(self._running.pids().values())):
            await asyncio.sleep(7.0)
        return "everything"

    async def _cut_worker(self) -> str:
        victim = self._rng.choice(self._workers)
        _cut(self._listening(victim))
        return victim

    async def _kill_frontend(self) -> str:
        index = self._rng.randrange(1, len(self._urls))
        url, name = self._urls[index], f"frontend-{index}"
        before = self._running.pids()[name]
        self.ledger.down[url] = math.inf
        os.kill(before, signal.SIGKILL)
        await self._until(lambda: self._reborn(name, before), name)
        self.ledger.down[url] = time.monotonic()
        return name

    async def _freeze_frontend(self) -> str:
        return await self._freeze(f"frontend-{self._rng.randrange(len(self._urls))}")

    async def _wipe_etcd(self) -> str:
        """Its data goes while it is frozen, so that it can write none of it again; then it is killed."""
        before = self._running.pids()["etcd"]
        os.kill(before, signal.SIGSTOP)
        for folder in (self._running.run.path / "control").glob("etcd-*/data"):
            await asyncio.to_thread(shutil.rmtree, folder)
        os.kill(before, signal.SIGKILL)
        await self._until(lambda: self._reborn("etcd", before), "etcd")
        return "etcd"

    # --- what is seen -----------------------------------------------------------------------------------------------

    def _reborn(self, victim: str, before: int) -> bool:
        record = _members(self._running.run).get(victim)
        return record is not None and record[0] not in (0, before) and record[1] is State.READY

    def _core(self, member: str) -> int:
        """The process of a worker's engine core."""
        return children(self._running.pids()[member])["VLLM::EngineCore"]

    def _listening(self, member: str) -> int:
        """The port of a worker's request socket."""
        log = self._running.run.log_of(1, member).read_text()
        return int(log.rpartition(" at tcp://")[2].split()[0].rpartition(":")[2])

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        begun = time.monotonic()
        while not condition():
            if time.monotonic() - begun > self._whole_s:
                self.ledger.problems.append(f"{what} did not come back within {self._whole_s:.0f} s")
                return
            await asyncio.sleep(POLL_S)

    async def _whole(self, after: str, workers: bool) -> float:
        """Seconds until what the fault could break is whole."""
        begun = time.monotonic()
        while not (await self._well() if workers else await self.known()):
            if time.monotonic() - begun > self._whole_s:
                self.ledger.problems.append(f"the deployment was not whole {self._whole_s:.0f} s after: {after}")
                break
            await asyncio.sleep(POLL_S)
        return time.monotonic() - begun

    async def _well(self) -> bool:
        """Whether every frontend says that nobody is missing."""
        return await self._all_answer({"ready"})

    async def known(self) -> bool:
        """Whether etcd lists every worker that is ready, and every frontend answers."""
        return await self._all_listed() and await self._all_answer({"ready", "degraded"})

    async def _all_answer(self, states: set[str]) -> bool:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            for url in self._urls:
                try:
                    async with session.get(f"{url}/health") as response:
                        if (await response.json())["status"] not in states:
                            return False
                except (aiohttp.ClientError, OSError, TimeoutError):
                    return False
        return True

    async def _all_listed(self) -> bool:
        """A worker says that it is ready once it is registered, so that who is ready and not listed was forgotten."""
        control = self._running.run.control()
        assert control
        ready = {name for name, (_, state) in _members(self._running.run).items() if state is State.READY}
        async with Etcd(control) as etcd:
            try:
                found, _ = await etcd.prefix(prefix(self._running.run.name))
            except EtcdError:
                return False
        return {key.rpartition("/")[2] for key in found} >= ready & set(self._workers)


@contextlib.contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """Processes that are stopped within the block."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
                os.kill(pid, signal.SIGCONT)


def can_cut() -> bool:
    """Whether this machine lets us break connections that are open: root, iproute2, and a kernel that can."""
    return os.geteuid() == 0 and shutil.which("ss") is not None


def _cut(port: int) -> None:
    """Break every open connection to a port of this machine, from the side of who connected."""
    subprocess.run(["ss", "-K", "dport", "=", str(port)], check=False, capture_output=True)


def _members(run: RunDirectory) -> dict[str, tuple[int, State]]:
    job = run.job()
    assert job
    ranks = run.ranks(job.attempt).values()
    return {name: (member.pid, member.state) for rank in ranks for name, member in rank.members.items()}
