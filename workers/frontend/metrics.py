"""What a frontend counts. Per request, not per token: tokens are added when a stream ends."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
            ("kind",),
            registry=self.registry,
        )
        self.local_prefills = Counter(
            "baton_frontend_local_prefills_total",
            "Prompts that a decode worker computed itself, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.usable_workers = Gauge(
            "baton_frontend_usable_workers", "Workers that would be asked now.", ("kind",), registry=self.registry
        )
        self.resumed = Counter(
            "baton_frontend_resumed_answers_total",
            "Answers that another worker went on with after theirs was lost.",
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "baton_frontend_prompt_tokens_total", "Tokens of the prompts that were answered.", registry=self.registry
        )
        self.cached_tokens = Counter(
            "baton_frontend_cached_tokens_total", "Of those, tokens found in a prefix cache.", registry=self.registry
        )
        self.completion_tokens = Counter(
            "baton_frontend_completion_tokens_total", "Tokens of the answers.", registry=self.registry
        )
        self.active = Gauge("baton_frontend_active_requests", "Requests being answered.", registry=self.registry)
        self.disconnected = Counter(
            "baton_frontend_disconnected_clients_total",
            "Clients that left before their answer.",
            registry=self.registry,
        )
        self.queued = Gauge(
            "baton_frontend_queued_requests", "Requests that wait for a worker with room.", registry=self.registry
        )
        self.refused = Counter(
            "baton_frontend_refused_total",
            "Requests that were refused because of load or of a limit of their key.",
            ("reason",),
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
            buckets=TTFT_BUCKETS,
            registry=self.registry,
        )

    def page(self) -> bytes:
        """The page for Prometheus."""
        return generate_latest(self.registry)
