"""What a worker counts and shows: numbers of the engine, labels of the member, and a page that nobody can break."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from launch.errors import LaunchError
from slurm import ports
from workers.engine.base import Load
from workers.engine.metrics import Canaries, EngineStats, Families, Labelled, Outcomes, WorkerFamilies, sum_up
from workers.engine.page import CLIENTS, MetricsPage, own_multiprocess_folder

LABELS = {"deployment": "d", "role": "decode", "replica": "1", "member": "decode-1"}


def scheduler(**changed: Any) -> SimpleNamespace:
    """vLLM 0.32's SchedulerStats, as far as it is read; the real ones are read in tests/system/test_health.py."""
    fields = {"num_running_reqs": 0, "num_waiting_reqs": 0, "num_skipped_waiting_reqs": 0, "kv_cache_usage": 0.0}
    return SimpleNamespace(**(fields | {"kv_connector_stats": None} | changed))


def iteration(**changed: Any) -> SimpleNamespace:
    """vLLM 0.32's IterationStats, as far as it is read."""
    return SimpleNamespace(**({"num_preempted_reqs": 0, "num_prompt_tokens": 0, "num_generation_tokens": 0} | changed))


def nixl(**changed: list[float]) -> dict[str, Any]:
    """What NIXL's connector reports of a step: a list entry for each event."""
    names = ("transfer_duration", "post_duration", "bytes_transferred", "num_descriptors", "num_failed_transfers")
    more = (
        "num_failed_notifications",
        "num_failed_handshakes",
        "num_kv_expired_reqs",
        "num_notifications_after_expiry",
    )
    return {name: [] for name in (*names, *more)} | changed


def families(stats: dict[int, EngineStats], theirs: Families | None = None) -> Labelled:
    """Everything on the page of a member."""
    ours = WorkerFamilies(stats, Outcomes(cancelled=2), Canaries(answered=3), lambda: True)
    return Labelled(LABELS, (ours,), theirs or CollectorRegistry())


@pytest.fixture
def port() -> Iterator[int]:
    """A port that nobody else uses."""
    with ports.claim("metrics-page", os.getpid()) as block:
        yield block.base + 1


@pytest.fixture
def serve(port: int) -> Iterator[Callable[..., str]]:
    """Serve a page; returns its address."""
    pages: list[MetricsPage] = []

    def start(
        shown: Families, health: Callable[[], str | None] = lambda: None, alive: Callable[[], bool] = lambda: True
    ) -> str:
        page = MetricsPage(shown, health, alive, admits=lambda key: True)
        page.start("127.0.0.1", port)
        pages.append(page)
        return f"http://127.0.0.1:{port}"

    yield start
    for page in pages:
        page.close()


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """A page as Prometheus reads it: name to labels to value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample.name} is on the page twice"
            found[sample.name][labels] = sample.value
    return found


def test_steps_add_up() -> None:
    """Gauges are the last step's, counters the sum of all."""
    stats = EngineStats()
    pulled = nixl(transfer_duration=[0.5, 0.25], bytes_transferred=[100, 50], num_failed_transfers=[1])
    stats.record(scheduler(num_running_reqs=3, num_waiting_reqs=1, num_skipped_waiting_reqs=2), iteration())
    stats.record(
        scheduler(num_running_reqs=1, kv_cache_usage=0.5, kv_connector_stats=pulled),
        iteration(num_preempted_reqs=1, num_prompt_tokens=10, num_generation_tokens=4),
    )
    stats.record(None, iteration(num_prompt_tokens=5))

    assert (stats.steps, stats.running, stats.waiting, stats.kv_usage) == (3, 1, 0, 0.5)
    assert (stats.preempted, stats.prompt_tokens, stats.generation_tokens) == (1, 15, 4)
    assert (stats.nixl.bytes, stats.nixl.seconds, stats.nixl.transfers) == (150, 0.75, 2)
    assert stats.nixl.failed_transfers == 1


def test_the_statistics_of_several_connectors_are_found() -> None:
    """vLLM's MultiConnector puts each connector's below its name."""
    stats = EngineStats()
    inner = nixl(transfer_duration=[0.5], bytes_transferred=[7])
    stats.record(scheduler(kv_connector_stats={"NixlConnector": inner, "OffloadingConnector": {"loads": 3}}), None)

    assert (stats.nixl.bytes, stats.nixl.transfers) == (7, 1)


def test_a_pull_after_the_lease_is_an_alarm_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Somebody was probably answered with another prompt's tokens."""
    stats = EngineStats()
    late = nixl(num_notifications_after_expiry=[1, 1])
    for _ in range(3):
        stats.record(scheduler(kv_connector_stats=late), None)

    assert stats.nixl.late_notifications == 6
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "another prompt's tokens" in errors[0].message


def test_the_load_of_all_ranks_is_one() -> None:
    """Sums, and the fullest cache."""
    load = Load()
    sum_up(
        load, [EngineStats(running=2, waiting=1, kv_usage=0.2, steps=5), EngineStats(running=1, kv_usage=0.7, steps=4)]
    )

    assert load == Load(progress=9, running=3, waiting=1, kv_usage=0.7)


def test_every_sample_says_whose_it_is(serve: Callable[..., str]) -> None:
    """Ours and vLLM's; what a sample says of itself is kept, and vLLM's `engine` is repeated as `dp_rank`."""
    theirs = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Running.", ("engine", "model_name"), registry=theirs).labels("3", "m").set(4)
    Counter("vllm:odd", "Odd.", ("role",), registry=theirs).labels("its own").inc()
    Histogram("vllm:wait_seconds", "Wait.", ("engine",), registry=theirs).labels("0").observe(1)
    Gauge("baton_worker_running_requests", "Ours by way of the files of multiprocess mode.", registry=theirs)
    stats = {0: EngineStats(kv_usage=0.25, steps=2), 3: EngineStats(running=7)}
    found = samples(httpx.get(serve(families(stats, theirs)) + "/metrics").text)

    whose = set(LABELS.items())
    for name, values in found.items():
        for labels in values:
            assert whose - {("role", "decode")} <= set(labels), name
    vllm = next(iter(found["vllm:num_requests_running"]))
    assert dict(vllm) == LABELS | {"engine": "3", "dp_rank": "3", "model_name": "m"}
    assert dict(next(iter(found["vllm:odd_total"])))["role"] == "its own"
    assert found["vllm:wait_seconds_count"][tuple(sorted((LABELS | {"engine": "0", "dp_rank": "0"}).items()))] == 1
    by_rank = {dict(labels)["dp_rank"]: value for labels, value in found["baton_worker_running_requests"].items()}
    assert by_rank == {"0": 0, "3": 7}
    assert sum(found["baton_worker_steps_total"].values()) == 2
    unserved = {dict(labels)["outcome"]: n for labels, n in found["baton_worker_unserved_requests_total"].items()}
    assert unserved == {"cancelled": 2, "refused": 0, "lost": 0, "failed": 0}


@pytest.mark.parametrize(
    ("status", "retryable", "cancelled", "outcome"),
    [
        pytest.param(503, False, True, "cancelled", id="nobody waits"),
        pytest.param(503, True, False, "lost", id="for another worker"),
        pytest.param(400, False, False, "refused", id="for nobody"),
        pytest.param(500, False, False, "failed", id="a bug"),
    ],
)
def test_a_request_not_served_has_one_outcome(status: int, retryable: bool, cancelled: bool, outcome: str) -> None:
    """By what the frontend was told."""
    outcomes = Outcomes()
    outcomes.note(status, retryable, cancelled)

    assert outcomes == Outcomes(**{outcome: 1})


def test_a_broken_collector_fails_the_scrape_and_nothing_else(serve: Callable[..., str]) -> None:
    """500 with the reason; the next scrape is whole again, health was never in doubt."""

    class Broken(CollectorRegistry):
        broken = True

        def collect(self) -> Iterable[Metric]:
            if self.broken:
                raise ValueError("no such luck")
            return super().collect()

    theirs = Broken()
    url = serve(families({0: EngineStats()}, theirs))
    first, health = httpx.get(url + "/metrics"), httpx.get(url + "/health")
    theirs.broken = False

    assert first.status_code == 500
    assert "no such luck" in first.text
    assert health.status_code == 200
    assert httpx.get(url + "/metrics").status_code == 200


def test_health_says_why_not(serve: Callable[..., str]) -> None:
    """503 with the reason, until there is none."""
    reasons: list[str] = ["draining"]
    url = serve(families({}), health=lambda: reasons[-1] if reasons else None)
    before = httpx.get(url + "/health")
    reasons.clear()
    after = httpx.get(url + "/health")

    assert (before.status_code, before.json()) == (503, {"status": "unavailable", "reason": "draining"})
    assert (after.status_code, after.json()) == (200, {"status": "ready"})
    assert httpx.head(url + "/health").content == b""
    assert httpx.get(url + "/elsewhere").status_code == 404


def test_live_is_about_the_loop(serve: Callable[..., str]) -> None:
    """A stuck loop is said by the page, which is not served by it."""
    alive = [True]
    url = serve(families({}), health=lambda: "draining", alive=lambda: alive[0])
    while_turning = httpx.get(url + "/live").status_code
    alive[0] = False

    assert while_turning == 200
    assert httpx.get(url + "/live").status_code == 503


def test_silent_clients_leave_room_for_others(serve: Callable[..., str], port: int) -> None:
    """Connections that say nothing take a place each, and there is a bound on them; the page answers beside them."""
    url = serve(families({}))
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(CLIENTS - 1)]
    status = httpx.get(url + "/live").status_code
    silent += [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    silent[-1].settimeout(5)
    refused = silent[-1].recv(1)
    for connection in silent:
        connection.close()

    assert status == 200
    assert refused == b""
    deadline = time.monotonic() + 5
    while True:
        try:
            assert httpx.get(url + "/live").status_code == 200
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline, "the places of closed connections are not free again"


COUNTING = """
import sys
from workers.engine.page import own_multiprocess_folder, process_families
own_multiprocess_folder(sys.argv[1])
from prometheus_client import Counter, generate_latest
Counter("vllm:steps", "Steps.", ("engine",)).labels("0").inc(int(sys.argv[2]))
print(generate_latest(process_families()).decode())
"""


def test_multiprocess_mode_shows_one_life_of_one_member(tmp_path: Path) -> None:
    """Members of a node share the folder that the environment names; neither they nor earlier lives are added up."""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "shared" / "metrics")}
    pages = [
        subprocess.run(
            [sys.executable, "-c", COUNTING, member, number], env=env, capture_output=True, text=True, check=True
        ).stdout
        for member, number in (("decode-0", "5"), ("decode-1", "7"), ("decode-0", "2"))
    ]

    assert [next(iter(samples(page)["vllm:steps_total"].values())) for page in pages] == [5, 7, 2]


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the engine starts, not at the first scrape."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(blocked))
    with pytest.raises(LaunchError, match="PROMETHEUS_MULTIPROC_DIR=.*cannot be written"):
        own_multiprocess_folder("decode-0")
