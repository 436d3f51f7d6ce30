"""What a frontend counts. Per request, not per token: tokens are added when a stream ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

TTFT_BUCKETS = (0.0022, 0.0047, 0.01, 0.022, 0.047, 0.1, 0.22, 0.47, 1.0, 2.2, 4.7, 10.0, 22.0, 48.0, 100.0)


class Metrics:
    """The frontend's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "baton_frontend_requests_total", "Requests by their answer.", ("route", "status"), registry=self.registry
        )
        self.legs = Counter(
            "baton_frontend_legs_total",
            "Legs of requests sent to workers; prefill legs are prompts computed apart from their decode.",
            (
                "model",
                "kind",
            ),
            registry=self.registry,
        )
        self.local_prefills = Counter(
            "baton_frontend_local_prefills_total",
            "Prompts that a decode worker computed itself, by reason.",
            (
                "model",
                "reason",
            ),
            registry=self.registry,
        )
        self.usable_workers = Gauge(
            "baton_frontend_usable_workers",
            "Workers that would be asked now.",
            (
                "model",
                "kind",
            ),
            registry=self.registry,
        )
        self.resumed = Counter(
            "baton_frontend_resumed_answers_total",
            "Answers that another worker went on with after theirs was lost.",
            labelnames=("model",),
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "baton_frontend_prompt_tokens_total",
            "Tokens of the prompts that were answered.",
            labelnames=("model",),
            registry=self.registry,
        )
        self.cached_tokens = Counter(
            "baton_frontend_cached_tokens_total",
            "Of those, tokens found in a prefix cache.",
            labelnames=("model",),
            registry=self.registry,
        )
        self.completion_tokens = Counter(
            "baton_frontend_completion_tokens_total",
            "Tokens of the answers.",
            labelnames=("model",),
            registry=self.registry,
        )
        self.active = Gauge("baton_frontend_active_requests", "Requests being answered.", registry=self.registry)
        self.disconnected = Counter(
            "baton_frontend_disconnected_clients_total",
            "Clients that left before their answer.",
            registry=self.registry,
        )
        self.queued = Gauge(
            "baton_frontend_queued_requests",
            "Requests that wait for a worker with room.",
            labelnames=("model",),
            registry=self.registry,
        )
        self.refused = Counter(
            "baton_frontend_refused_total",
            "Requests that were refused because of load or of a limit of their key.",
            (
                "model",
                "reason",
            ),
            registry=self.registry,
        )
        self.cut = Counter(
            "baton_frontend_cut_connections_total",
            "Connections that were closed because their clients read or sent too slowly.",
            ("reason",),
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "baton_frontend_time_to_first_token_seconds",
            "From the whole request to the first bytes of a stream, in seconds.",
            labelnames=("model",),
            buckets=TTFT_BUCKETS,
            registry=self.registry,
        )

    def page(self) -> bytes:
        """The page for Prometheus."""
        return generate_latest(self.registry)

    def of(self, model: str) -> ModelMetrics:
        """What is counted of one model."""
        return ModelMetrics(self, model)


class ModelMetrics:
    """The metrics of one model: those of all with its name as a label."""

    def __init__(self, every: Metrics, model: str) -> None:
        self._every = every
        self._model = model
        self.resumed = every.resumed.labels(model)
        self.prompt_tokens = every.prompt_tokens.labels(model)
        self.cached_tokens = every.cached_tokens.labels(model)
        self.completion_tokens = every.completion_tokens.labels(model)
        self.queued = every.queued.labels(model)
        self.first_byte = every.first_byte.labels(model)

    def legs(self, kind: str) -> Counter:
        """Legs sent to workers of a kind."""
        return self._every.legs.labels(self._model, kind)

    def local_prefills(self, reason: str) -> Counter:
        """Prompts that a decode worker computed itself."""
        return self._every.local_prefills.labels(self._model, reason)

    def usable_workers(self, kind: str) -> Gauge:
        """Workers of a kind that would be asked now."""
        return self._every.usable_workers.labels(self._model, kind)

    def refused(self, reason: str) -> Counter:
        """Requests that were refused."""
        return self._every.refused.labels(self._model, reason)


class ByModel(Collector):
    """Families that each of several models has, as one, with the model as a label."""

    def __init__(self, collectors: Mapping[str, Collector]) -> None:
        self._collectors = collectors

    def collect(self) -> Iterator[Metric]:
        """prometheus_client.registry.Collector."""
        found: dict[str, Metric] = {}
        for model, collector in self._collectors.items():
            for family in collector.collect():
                whole = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [item._replace(labels={"model": model, **item.labels}) for item in family.samples]
        yield from found.values()
