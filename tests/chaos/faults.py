"""Faults: what is done to the processes and connections of a running deployment, and how long it takes to be whole again.

The first member of each kind is never killed, only frozen and cut off: it shows what a long life leaks, and that somebody
is always there to answer. One worker is broken at a time, or one of each kind, so that another one can go on; and at the
same time one of all that is no worker. Each of these is a `Series` of its own.
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
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp

from launch.records import RunDirectory, State
from tests.deployments import Deployment, children
from workers.runtime.etcd import Etcd, EtcdError
from workers.runtime.registry import prefix

POLL_S = 0.1


Deed = Callable[[], Awaitable[str]]
"""Does a fault, waits until its victim is back, and returns the victim's name."""


@dataclass(slots=True)
class Done:
    """One fault: its name, its victim, the seconds from its end until the deployment was whole, and those of it all."""

    fault: str
    victim: str
    whole_s: float
    took_s: float


@dataclass(frozen=True, slots=True)
class Series:
    """Faults that are done one after the other; `kinds` are those of the workers among their victims."""

    kinds: tuple[str, ...]
    deeds: dict[str, Deed]


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

    def __init__(
        self, running: Deployment, seed: int, whole_s: float = 90.0, cores: bool = False, abreast: bool = False
    ) -> None:
        """Make them; `cores` are vLLM's engine cores, which then are broken too; `abreast` breaks one worker of each kind."""
        self.ledger = Ledger()
        self._running = running
        self._whole_s = whole_s
        self._rng = random.Random(seed)
        self._workers = [name for name in running.pids() if name.startswith(("prefill", "decode", "aggregated"))]
        self._urls = [url.removesuffix("/v1") for url in running.endpoint.urls]
        self._headers = {"Authorization": f"Bearer {running.run.api_key()}"}
        self._counts = Counter(_kind(name) for name in self._workers)
        kinds = sorted(self._counts)
        self.on_workers = [
            self._of_workers(some, cores) for some in ([[kind] for kind in kinds] if abreast else [kinds])
        ]
        self.on_others = Series(
            (),
            {
                "kill NATS": lambda: self._kill("nats"),
                "kill etcd": lambda: self._kill("etcd"),
                "kill NATS and etcd": lambda: self._kill("nats", "etcd"),
                "wipe etcd's data": self._wipe_etcd,
                "freeze NATS": lambda: self._freeze("nats"),
                "freeze etcd": lambda: self._freeze("etcd"),
                "kill a frontend": self._kill_frontend,
                "freeze a frontend": self._freeze_frontend,
                "pause everything": self._pause,
            },
        )

    async def run(self, series: Series, pause_s: float, stop: asyncio.Event) -> None:
        """Do one after the other, each in its turn of a random order, until `stop` is set.

        A fault that cannot be done, since its victim died of something else, say, is a problem and does not end the storm.
        """
        order: list[str] = []
        while not stop.is_set():
            order = order or self._rng.sample(list(series.deeds), len(series.deeds))
            name = order.pop()
            try:
                await self._do(name, series)
            except (OSError, LookupError, ValueError, TimeoutError) as error:
                self.ledger.problems.append(f"{time.strftime('%H:%M:%S')} {name} failed: {error!r}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rng.random() * pause_s):
                    await stop.wait()

    async def do(self, name: str) -> Done:
        """Do one fault by its name, to a worker of any kind if it is one for workers."""
        able = [series for series in (*self.on_workers, self.on_others) if name in series.deeds]
        return await self._do(name, self._rng.choice(able))

    async def _do(self, name: str, series: Series) -> Done:
        """Do a fault, and wait until what it could break is whole."""
        begun = time.monotonic()
        victim = await series.deeds[name]()
        whole_s = await self._whole(f"{name} ({victim})", series.kinds)
        done = Done(name, victim, whole_s, time.monotonic() - begun)
        self.ledger.done.append(done)
        return done

    def _of_workers(self, kinds: Sequence[str], cores: bool) -> Series:
        workers = [name for name in self._workers if _kind(name) in kinds]
        killable = [name for name in workers if not name.endswith("-0")]
        found: dict[str, Deed] = {"freeze a worker": lambda: self._freeze(self._rng.choice(workers))}
        if killable:
            found["kill a worker"] = lambda: self._kill(self._rng.choice(killable))
            found["stop a worker with SIGTERM"] = lambda: self._kill(self._rng.choice(killable), signum=signal.SIGTERM)
        if cores:
            found["freeze an engine core"] = lambda: self._freeze_core(self._rng.choice(workers))
        if cores and killable:
            found["kill an engine core"] = lambda: self._kill_core(self._rng.choice(killable))
        if can_cut():
            found["cut the connections of a worker"] = lambda: self._cut_worker(self._rng.choice(workers))
        return Series(tuple(kinds), found)

    # --- what is done -----------------------------------------------------------------------------------------------

    async def _kill(self, *victims: str, signum: int = signal.SIGKILL) -> str:
        before = {victim: await self._living(victim) for victim in victims}
        for pid in before.values():
            os.kill(pid, signum)
        await self._until(lambda: all(self._reborn(victim, before[victim]) for victim in victims), " ".join(victims))
        return " and ".join(victims)

    async def _kill_core(self, victim: str) -> str:
        """The worker notices, and ends for its agent to start it again."""
        before = await self._living(victim)
        os.kill(_core(before), signal.SIGKILL)
        await self._until(lambda: self._reborn(victim, before), victim)
        return victim

    async def _freeze_core(self, victim: str) -> str:
        with frozen([_core(await self._living(victim))]):
            await asyncio.sleep(self._rng.choice((0.5, 3.0, 12.0)))
        return victim

    async def _freeze(self, victim: str) -> str:
        with frozen([await self._living(victim)]):
            await asyncio.sleep(self._rng.choice((0.5, 3.0, 7.0)))
        return victim

    async def _pause(self) -> str:
        """As when a laptop is closed: every process of the deployment that serves, at once, longer than any timeout."""
        with frozen(list(self._running.pids().values())):
            await asyncio.sleep(7.0)
        return "everything"

    async def _cut_worker(self, victim: str) -> str:
        await asyncio.to_thread(_cut, self._listening(victim))
        return victim

    async def _kill_frontend(self) -> str:
        index = self._rng.randrange(1, len(self._urls))
        url, name = self._urls[index], f"frontend-{index}"
        before = await self._living(name)
        self.ledger.down[url] = math.inf
        os.kill(before, signal.SIGKILL)
        await self._until(lambda: self._reborn(name, before), name)
        self.ledger.down[url] = time.monotonic()
        return name

    async def _freeze_frontend(self) -> str:
        return await self._freeze(f"frontend-{self._rng.randrange(len(self._urls))}")

    async def _wipe_etcd(self) -> str:
        """Its data goes while it is frozen, so that it can write none of it again; then it is killed."""
        before = await self._living("etcd")
        os.kill(before, signal.SIGSTOP)
        for folder in (self._running.run.path / "control").glob("etcd-*/data"):
            await asyncio.to_thread(shutil.rmtree, folder)
        os.kill(before, signal.SIGKILL)
        await self._until(lambda: self._reborn("etcd", before), "etcd")
        return "etcd"

    # --- what is seen -----------------------------------------------------------------------------------------------

    async def _living(self, victim: str) -> int:
        """The process of a member, once it is ready: it may be on its way back from another fault."""
        await self._until(lambda: self._reborn(victim, 0), victim)
        return self._running.pids()[victim]

    def _reborn(self, victim: str, before: int) -> bool:
        record = _members(self._running.run).get(victim)
        return record is not None and record[0] not in (0, before) and record[1] is State.READY

    def _listening(self, member: str) -> int:
        """The port of a worker's request socket."""
        log = self._running.run.log_of(1, member).read_text()
        return int(log.rpartition(" at tcp://")[2].split()[0].rpartition(":")[2])

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it.

        Raises:
            TimeoutError: It does not come to be; what would follow could hit a process that is none of ours.
        """
        begun = time.monotonic()
        while not condition():
            if time.monotonic() - begun > self._whole_s:
                raise TimeoutError(f"{what} did not come back within {self._whole_s:.0f} s")
            await asyncio.sleep(POLL_S)

    async def _whole(self, after: str, kinds: tuple[str, ...]) -> float:
        """Seconds until what the fault could break is whole."""
        begun = time.monotonic()
        while not (await self._all_usable(kinds) if kinds else await self.known()):
            if time.monotonic() - begun > self._whole_s:
                self.ledger.problems.append(f"the deployment was not whole {self._whole_s:.0f} s after: {after}")
                break
            await asyncio.sleep(POLL_S)
        return time.monotonic() - begun

    async def _all_usable(self, kinds: tuple[str, ...]) -> bool:
        """Whether every frontend would ask every worker of these kinds."""
        model = self._running.endpoint.models[0]
        lines = {
            f'baton_frontend_usable_workers{{kind="{kind}",model="{model}"}} {self._counts[kind]}.0' for kind in kinds
        }
        return all(lines <= set(page.splitlines()) for page in await self._pages("/metrics"))

    async def known(self) -> bool:
        """Whether etcd lists every worker that is ready, and every frontend answers."""
        return await self._all_listed() and all(
            '"ready"' in page or '"degraded"' in page for page in await self._pages("/health")
        )

    async def _pages(self, path: str) -> list[str]:
        """What every frontend answers there; nothing where one does not answer."""

        async def page(session: aiohttp.ClientSession, url: str) -> str:
            try:
                async with session.get(f"{url}{path}") as response:
                    return await response.text()
            except (aiohttp.ClientError, OSError, TimeoutError):
                return ""

        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers) as session:
            return [await page(session, url) for url in self._urls]

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
def frozen(pids: Sequence[int]) -> Iterator[None]:
    """Processes that are stopped within the block; 0 stands for one that is just being started."""
    pids = [pid for pid in pids if pid]  # to the kernel 0 is every process of our own group
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


def _kind(member: str) -> str:
    """The kind of a worker, by its name."""
    return member.rpartition("-")[0]


def _core(pid: int) -> int:
    """The process of a worker's engine core."""
    return children(pid)["VLLM::EngineCore"]


def _members(run: RunDirectory) -> dict[str, tuple[int, State]]:
    job = run.job()
    assert job
    ranks = run.ranks(job.attempt).values()
    return {name: (member.pid, member.state) for rank in ranks for name, member in rank.members.items()}
