"""What a worker counts, and how it is shown: its engine's ranks, its requests, its canaries, and vLLM's own metrics.

Counting is an addition to a plain number, in the loop; families are made when somebody looks. vLLM drops every collector
whose name starts with `vllm:` when it builds an engine, so ours are named `baton_worker_...`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from workers.engine.base import Load

log = logging.getLogger(__name__)

PREFIX = "baton_"
# vLLM 0.32 calls a data-parallel rank `engine`, by its global number.
VLLM_RANK = "engine"
RANK = "dp_rank"


class Families(Protocol):
    """Whatever yields metric families: a registry, or a collector."""

    def collect(self) -> Iterable[Metric]:
        """The families as they are now."""
        ...


@dataclass(slots=True)
class Nixl:
    """KV cache transfers of one rank since it started; the last two are counted where a prefill was computed."""

    bytes: int = 0
    seconds: float = 0.0
    transfers: int = 0
    failed_transfers: int = 0
    failed_handshakes: int = 0
    failed_notifications: int = 0
    expired_leases: int = 0
    late_notifications: int = 0

    def add(self, stats: Mapping[str, Any]) -> None:
        """Add one step's `kv_connector_stats`: lists by vLLM 0.32's names, below a connector's name if there are several."""
        if "transfer_duration" not in stats:
            for inner in stats.values():
                if isinstance(inner, Mapping):
                    self.add(inner)
            return
        self.bytes += sum(stats.get("bytes_transferred", ()))
        self.seconds += sum(stats["transfer_duration"])
        self.transfers += len(stats["transfer_duration"])
        self.failed_transfers += len(stats.get("num_failed_transfers", ()))
        self.failed_handshakes += len(stats.get("num_failed_handshakes", ()))
        self.failed_notifications += len(stats.get("num_failed_notifications", ()))
        self.expired_leases += len(stats.get("num_kv_expired_reqs", ()))
        late = len(stats.get("num_notifications_after_expiry", ()))
        if late and not self.late_notifications:
            log.error(
                "a decode engine pulled KV blocks after their lease: it probably answered with another prompt's tokens. "
                "Raise kv_lease_duration above the time that decode requests queue, and compare the nodes' clocks"
            )
        self.late_notifications += late


@dataclass(slots=True)
class EngineStats:
    """One data-parallel rank of an engine: gauges as of its last step, and sums since it started.

    A step is a turn of vLLM's scheduler. vLLM reports each one that had work, a chunk of a long prefill and the wait for
    a pull included; an idle engine takes none.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    preempted: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    last_step: float = field(default_factory=time.monotonic)
    nixl: Nixl = field(default_factory=Nixl)

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Add one step: vLLM's SchedulerStats and IterationStats, either of which may be None."""
        self.steps += 1
        self.last_step = time.monotonic()
        if scheduler is not None:
            self.running = scheduler.num_running_reqs
            self.waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self.kv_usage = scheduler.kv_cache_usage
            if scheduler.kv_connector_stats:
                self.nixl.add(scheduler.kv_connector_stats)
        if iteration is not None:
            self.preempted += iteration.num_preempted_reqs
            self.prompt_tokens += iteration.num_prompt_tokens
            self.generation_tokens += iteration.num_generation_tokens


def sum_up(load: Load, ranks: Iterable[EngineStats]) -> None:
    """Set `load`, the view that routers read, from all ranks; its `kv_usage` is that of the fullest one."""
    load.progress = load.running = load.waiting = 0
    load.kv_usage = 0.0
    for rank in ranks:
        load.progress += rank.steps
        load.running += rank.running
        load.waiting += rank.waiting
        load.kv_usage = max(load.kv_usage, rank.kv_usage)


@dataclass(slots=True)
class Outcomes:
    """Requests that a worker did not serve to their end."""

    cancelled: int = 0
    """Nobody waited any more."""
    refused: int = 0
    """No engine would serve them."""
    lost: int = 0
    """Given back, to be tried elsewhere."""
    failed: int = 0
    """Failed here; trying elsewhere would not help."""

    def note(self, status: int, retryable: bool, cancelled: bool) -> None:
        """Count a request that ended with this HTTP status."""
        if cancelled:
            self.cancelled += 1
        elif retryable:
            self.lost += 1
        elif status < 500:
            self.refused += 1
        else:
            self.failed += 1


@dataclass(slots=True)
class Canaries:
    """Requests that a worker sent to its own engine."""

    answered: int = 0
    failed: int = 0
    last_s: float = 0.0
    """Seconds that the last answered one took."""


@dataclass(frozen=True, slots=True)
class WorkerFamilies:
    """The worker's own metrics."""

    ranks: Mapping[int, EngineStats]
    outcomes: Outcomes
    canaries: Canaries
    serving: Callable[[], bool]

    def collect(self) -> Iterator[Metric]:
        """The families as they are now."""
        ranks = sorted(self.ranks.items())
        now = time.monotonic()
        gauges: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
            ("running_requests", "Requests that the scheduler runs.", lambda r: r.running),
            ("waiting_requests", "Requests that wait to be run, or for their KV cache.", lambda r: r.waiting),
            ("kv_usage_ratio", "Share of the KV blocks in use, 0 to 1.", lambda r: r.kv_usage),
            ("step_age_seconds", "Time since the last step; grows while idle.", lambda r: max(0.0, now - r.last_step)),
        )
        counters: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
            ("steps", "Turns of the scheduler that had work.", lambda r: r.steps),
            ("preempted_requests", "Requests put back because KV blocks ran out.", lambda r: r.preempted),
            ("prompt_tokens", "Tokens of prompts, cached ones and canaries included.", lambda r: r.prompt_tokens),
            ("generation_tokens", "Tokens produced, canaries' included.", lambda r: r.generation_tokens),
            ("nixl_transferred_bytes", "KV cache pulled from other engines.", lambda r: r.nixl.bytes),
            ("nixl_transfer_seconds", "Time of those pulls, added up.", lambda r: r.nixl.seconds),
            ("nixl_transfers", "Pulls that succeeded.", lambda r: r.nixl.transfers),
            ("nixl_failed_transfers", "Pulls that failed.", lambda r: r.nixl.failed_transfers),
            (
                "nixl_failed_handshakes",
                "Peers that did not answer or do not match.",
                lambda r: r.nixl.failed_handshakes,
            ),
            ("nixl_failed_notifications", "Pulls whose end was not told.", lambda r: r.nixl.failed_notifications),
            ("nixl_expired_leases", "Prefills freed because nobody pulled in time.", lambda r: r.nixl.expired_leases),
            (
                "nixl_notifications_after_expiry",
                "Pulls after the blocks were freed: wrong tokens were probably served. Raise an alarm above 0.",
                lambda r: r.nixl.late_notifications,
            ),
        )
        for name, text, of in gauges:
            yield _family(GaugeMetricFamily, name, text, RANK, ((str(n), of(rank)) for n, rank in ranks))
        for name, text, of in counters:
            yield _family(CounterMetricFamily, name, text, RANK, ((str(n), of(rank)) for n, rank in ranks))
        outcomes = ("cancelled", "refused", "lost", "failed")
        yield _family(
            CounterMetricFamily,
            "unserved_requests",
            "Requests not served to their end: cancelled, refused, lost (given back to be tried elsewhere) or failed.",
            "outcome",
            ((name, getattr(self.outcomes, name)) for name in outcomes),
        )
        yield _family(
            CounterMetricFamily,
            "canaries",
            "Requests that the worker sent to its own engine.",
            "result",
            (("answered", self.canaries.answered), ("failed", self.canaries.failed)),
        )
        yield GaugeMetricFamily(
            "baton_worker_canary_seconds", "Time of the last canary that was answered.", self.canaries.last_s
        )
        yield GaugeMetricFamily("baton_worker_serving", "1 while the worker takes requests.", float(self.serving()))


def _family(
    kind: type[GaugeMetricFamily | CounterMetricFamily],
    name: str,
    text: str,
    label: str,
    values: Iterable[tuple[str, float]],
) -> Metric:
    family = kind(f"baton_worker_{name}", text, labels=(label,))
    for value, number in values:
        family.add_metric((value,), number)
    return family


@dataclass(frozen=True, slots=True)
class Labelled:
    """Several sources on one page, every sample with the labels that tell this member from others.

    A label that a sample has is left alone. `theirs` may hold metrics of ours too (in multiprocess mode they go through
    the same files); those are left out, `ours` has them.
    """

    labels: Mapping[str, str]
    ours: tuple[Families, ...]
    theirs: Families

    def collect(self) -> Iterator[Metric]:
        """The families of all sources."""
        for source in self.ours:
            yield from map(self._labelled, source.collect())
        for family in self.theirs.collect():
            if not family.name.startswith(PREFIX):
                yield self._labelled(family)

    def _labelled(self, family: Metric) -> Metric:
        found = Metric(family.name, family.documentation, family.type, family.unit)
        for sample in family.samples:
            labels = {**self.labels, **sample.labels}
            if VLLM_RANK in sample.labels:
                labels.setdefault(RANK, sample.labels[VLLM_RANK])
            found.samples.append(sample._replace(labels=labels))
        return found
