"""A network that is cut while the file system is not: the node of the head lives, and nobody can reach it.

Each rank is an agent in a network namespace of its own, behind a router that can stop to pass on what one of them sends and
what is sent to it. All of them write to the same run directory.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.compose import read
from launch.plan import plan
from launch.recipe import Launcher
from launch.records import Endpoint, Job, Phase, RunDirectory
from slurm.head import LEASE_S
from slurm.signals import AGAIN_AFTER_S
from tests.deployments import processes_of
from tests.slurm.test_matrix import ROOT, routed
from tests.slurm.test_standby import standing_by, until

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(400), ROOT]

WORDS = (
    "+recipe=tiny_2p2d",
    "engine.backend=echo",
    "cluster=slurm_cpu",
    "cluster.interface=fab0",
    "preflight.level=off",
    "control.standby=true",
    "engine.drain_s=5",
)
ASK = """
import sys
from openai import OpenAI
url, key, count = sys.argv[1:]
with OpenAI(base_url=url, api_key=key, max_retries=0, timeout=30) as client:
    model = client.models.list().data[0].id
    for number in range(int(count)):
        answer = client.completions.create(model=model, prompt=f"request {number}", max_tokens=8)
        assert answer.usage.completion_tokens == 8
print("answered", count)
"""


class Nodes:
    """A deployment of four ranks in four namespaces."""

    def __init__(self, run: RunDirectory, router: str, namespaces: list[str]) -> None:
        self.run = run
        self._router = router
        self._namespaces = namespaces
        self._agents: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """As srun would, with its variables."""
        for rank, namespace in enumerate(self._namespaces):
            env = {
                "SLURM_PROCID": str(rank),
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": f"n[1-{len(self._namespaces)}]",
            }
            argv = ["ip", "netns", "exec", namespace, sys.executable, "-m", "slurm.task", str(self.run.path), "1"]
            with (self.run.logs(1) / f"rank_{rank}_log.out").open("wb") as log:
                self._agents.append(subprocess.Popen(argv, env={**os.environ, **env}, stdout=log, stderr=log))

    def cut(self, rank: int) -> None:
        """From now on the router drops what comes from a node and what goes to it; nobody is told."""
        self._rules("add", rank)

    def mend(self, rank: int) -> None:
        """Pass on everything again."""
        self._rules("del", rank)

    def ask(self, url: str, count: int) -> str:
        """What a client says that stands at the router: `answered <count>`."""
        argv = ["ip", "netns", "exec", self._router, sys.executable, "-c", ASK, url, self.run.api_key(), str(count)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
        return done.stdout + done.stderr

    def killed(self) -> list[str]:
        """Members that had to be killed because they did not end when they were told to.

        A server of etcd may: it first looks for another that would lead, and one of them cannot be reached.
        """
        lines = [line for rank in range(len(self._agents)) for line in self.log(rank).splitlines()]
        return [line for line in lines if "did not end within" in line and "etcd" not in line]

    def log(self, rank: int) -> str:
        """What an agent has logged."""
        return (self.run.logs(1) / f"rank_{rank}_log.out").read_text()

    def wait(self, timeout_s: float = 90) -> list[int]:
        """The exit codes of all agents."""
        return [agent.wait(timeout_s) for agent in self._agents]

    def end(self) -> None:
        """Leave nothing behind, whatever the test did."""
        for _ in range(2):  # agents take the first as a request, the second as an order
            running = [agent for agent in self._agents if agent.poll() is None]
            for agent in running:
                agent.send_signal(signal.SIGTERM)
            time.sleep(AGAIN_AFTER_S + 0.5 if running else 0)
        for agent in self._agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(30)
            if agent.poll() is None:
                agent.kill()
                agent.wait()

    def _rules(self, verb: str, rank: int) -> None:
        for side in ("from", "to"):
            command = f"ip -n {self._router} rule {verb} {side} 10.214.{rank}.2 blackhole"
            subprocess.run(command.split(), check=True, capture_output=True)


@pytest.fixture
def nodes(tmp_path: Path, tiny_model: Path) -> Iterator[Nodes]:
    """Four ranks, each in a namespace; three of them may lead."""
    recipe = read([*WORDS, f"model.path=tiny:{tiny_model}"]).recipe
    where, run = plan(recipe), RunDirectory(tmp_path / "runs" / "cut")
    run.prepare(recipe, where, 1)
    # An allocation, so that nobody asks Slurm for a job that there is not.
    run.put_job(
        Job(launcher=Launcher.ALLOCATION, attempt=1, id="", host="here", submitted_at=time.time(), nodes=where.ranks)
    )
    with routed(where.ranks, []) as namespaces:
        for name in namespaces:
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        found = Nodes(run, f"bm{os.getpid()}r", namespaces)
        try:
            found.start()
            until(lambda: (endpoint := run.endpoint()) is not None and endpoint.state is Phase.READY, 120)
            until(lambda: standing_by(run))
            yield found
        finally:
            found.end()
            assert processes_of(run) == {}


class Published:
    """Every endpoint that was published, in order: the file is looked at all the time."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self.seen: list[Endpoint] = []

    def until(self, condition: Callable[[], bool], timeout_s: float = 60) -> float:
        """Wait for it, or fail; returns the seconds that it took."""

        def looked() -> bool:
            endpoint = self._run.endpoint()
            if endpoint and endpoint not in self.seen[-1:]:
                self.seen.append(endpoint)
            return condition()

        return until(looked, timeout_s)

    def for_s(self, seconds: float) -> None:
        """Look for a while."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end, seconds + 30)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Who published, and in which term: one after another, without repetitions."""
        pairs = [(endpoint.head, endpoint.term) for endpoint in self.seen]
        return [pair for index, pair in enumerate(pairs) if pair not in pairs[index - 1 : index]]


def test_a_head_that_is_cut_off_publishes_nothing_while_another_leads(nodes: Nodes) -> None:
    """Its node lives and writes to the run directory; another leads, serves, and stays head when the path is back: then all
    of it is one deployment again, which ends in order.
    """
    run, published = nodes.run, Published(nodes.run)
    published.until(lambda: True)
    before = published.seen[-1]
    nodes.cut(0)
    moved_s = published.until(lambda: published.seen[-1].head != 0)
    after = published.seen[-1]
    during = nodes.ask(after.url, 8)
    published.for_s(4 * LEASE_S)
    alive_meanwhile = run.ranks(1)[0].heartbeat > time.time() - 10
    later = nodes.ask(published.seen[-1].url, 8)
    nodes.mend(0)
    mended_s = published.until(lambda: "rank 0 no longer leads" in nodes.log(0))
    published.until(lambda: published.seen[-1].state is Phase.READY and not published.seen[-1].lost)
    published.for_s(2 * LEASE_S)
    whole = nodes.ask(published.seen[-1].url, 16)
    standing = standing_by(run)
    run.stop_file.touch()
    codes = nodes.wait()
    published.until(lambda: True)

    print([(str(endpoint.state), endpoint.lost) for endpoint in published.seen])
    print(f"another head after {moved_s:.1f} s; the first gave up {mended_s:.1f} s after the path was back")
    assert (before.head, after.head) in {(0, 1), (0, 2)}
    assert published.heads == [(0, before.term), (after.head, after.term)]
    assert (during, later, whole) == ("answered 8\n", "answered 8\n", "answered 16\n")
    assert alive_meanwhile
    assert standing
    assert codes == [0, 0, 0, 0]
    assert nodes.killed() == []
    assert published.seen[-1].state is Phase.STOPPED
    assert all(record.ended and not record.failure for record in run.ranks(1).values())


def test_a_stop_while_the_first_head_is_cut_off_ends_all_of_it(nodes: Nodes) -> None:
    """Its node hears of the stop through the run directory, and nothing of it is left."""
    run, published = nodes.run, Published(nodes.run)
    nodes.cut(0)
    published.until(lambda: bool(published.seen) and published.seen[-1].head != 0)
    after = published.seen[-1]
    run.stop_file.touch()
    begun = time.monotonic()
    codes = nodes.wait(120)
    ended_s = time.monotonic() - begun
    published.until(lambda: True)

    print(f"all had ended after {ended_s:.1f} s")
    assert codes == [0, 0, 0, 0]
    assert nodes.killed() == []
    assert published.heads[-1] == (after.head, after.term)
    assert published.seen[-1].state is Phase.STOPPED
