"""What there is to see of routing by KV cache, read when somebody looks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from workers.frontend.kv_router import KvRouter

PREFIX = "baton_frontend_kv_"


class KvMetrics(Collector):
    """The families of one frontend's KV router."""

    def __init__(self, router: KvRouter) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        """prometheus_client.registry.Collector."""
        view, hits = self._router.view, self._router.hits
        blocks = GaugeMetricFamily(f"{PREFIX}blocks", "Different KV blocks that workers hold.", labels=["tier"])
        for tier, number in view.held().items():
            blocks.add_metric([tier], number)
        yield blocks
        yield GaugeMetricFamily(
            f"{PREFIX}predicted_blocks", "KV blocks that are expected at a worker.", value=len(view.predictions)
        )
        yield GaugeMetricFamily(
            f"{PREFIX}untold_workers",
            "Ranks of workers that should tell which KV blocks they hold, and do not.",
            value=len(view.troubles),
        )
        counts = view.counts
        for name, text, value in (
            ("changes", "Messages of changes that workers told.", counts.changes),
            ("changed_blocks", "KV blocks that came or went.", counts.blocks),
            ("gaps", "Times that changes were missed and the whole was asked for.", counts.gaps),
            ("pictures", "Whole pictures taken in, at the start or after a gap.", counts.pictures),
            ("predicted_hit_tokens", "Prompt tokens expected in the chosen worker's cache.", hits.predicted_tokens),
            ("hit_tokens", "Prompt tokens found there.", hits.actual_tokens),
        ):
            yield CounterMetricFamily(f"{PREFIX}{name}", text, value=value)
        for name, text, counter in (
            ("requests", "Prompts sent, by worker.", hits.requests),
            ("computed_tokens", "Prompt tokens that were not cached there, by worker.", hits.computed_tokens),
        ):
            family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=["worker", "dp_rank"])
            for (member, rank), number in counter.items():
                family.add_metric([member, str(rank)], number)
            yield family
