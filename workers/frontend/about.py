"""What a deployment says of itself: models, readiness, health, versions, metrics."""

from __future__ import annotations

import datetime
import importlib.metadata
from typing import Any

import msgspec

from workers.frontend.http import Request
from workers.frontend.metrics import Metrics
from workers.frontend.models import Models
from workers.frontend.reply import Reply, told
from workers.frontend.service import Service

ANTHROPIC_VERSION = "anthropic-version"


class About:
    """The routes that need no engine to answer."""

    def __init__(self, models: Models, metrics: Metrics) -> None:
        self._models = models
        self._metrics = metrics
        self._version = _own_version()

    async def models(self, request: Request, reply: Reply) -> None:
        """GET /v1/models: those that can be asked now."""
        names = self._models.names
        if ANTHROPIC_VERSION in request.headers:
            ends = {"first_id": names[0] if names else None, "last_id": names[-1] if names else None}
            found = {"data": [self._anthropic_model(name) for name in names], "has_more": False, **ends}
        else:
            found = {"object": "list", "data": [self._model(name) for name in names]}
        reply.respond(200, msgspec.json.encode(found), told(request))

    async def model(self, request: Request, reply: Reply, name: str) -> None:
        """GET /v1/models/{model}."""
        as_said = self._anthropic_model if ANTHROPIC_VERSION in request.headers else self._model
        reply.respond(200, msgspec.json.encode(as_said(name)), told(request))

    async def ready(self, request: Request, reply: Reply, name: str) -> None:
        """GET /v1/models/{model}/ready: 200 or 503, what is missing of it, and how many workers of each kind there are."""
        service = self._models.find(name)
        pool = service.pool
        able = not service.draining and not pool.unable
        adapter = service.adapter(name)
        workers = {str(kind): {"ready": len(pool.usable(kind, adapter))} for kind in pool.needed}
        state = {
            "id": name,
            "ready": able,
            "reason": service.reason(pool.missing) if pool.missing or service.draining else None,
            "missing": [str(kind) for kind in pool.missing],
            "workers": workers,
        }
        reply.respond(200 if able else 503, msgspec.json.encode(state), told(request))

    async def health(self, request: Request, reply: Reply) -> None:
        """GET /health, and /ping as hosting services call it: ready once all models are, 503 only when none answers."""
        services = self._models.services
        left = services[0].seconds_left()
        limit: dict[str, Any] = {} if left is None else {"seconds_left": left}
        missing = [service.reason(service.pool.missing) for service in services if service.pool.missing]
        troubles = [trouble for service in services for trouble in service.pool.troubles]
        able = [service for service in services if not service.pool.unable]
        if self._models.draining or not able:
            reason = services[0].reason([]) if self._models.draining else "; ".join(missing)
            status, state = 503, {"status": "unavailable", "reason": reason}
        elif missing:
            status, state = 200, {"status": "degraded", "reason": "; ".join(missing)}
        elif troubles:
            reason = f"requests are routed with less than was asked for: {'; '.join(troubles)}"
            status, state = 200, {"status": "degraded", "reason": reason}
        else:
            status, state = 200, {"status": "ready"}
        models: dict[str, Any] = {}
        if len(services) > 1:
            models["models"] = {service.served.name: _standing(service) for service in services}
        # The status stays the last word: by it the head knows that a frontend is ready (slurm.overseer).
        reply.respond(status, msgspec.json.encode(models | (state if status == 503 else limit | state)))

    async def live(self, request: Request, reply: Reply) -> None:
        """GET /live."""
        reply.respond(200, b'{"status":"alive"}')

    async def version(self, request: Request, reply: Reply) -> None:
        """GET /version: ours, and the engines'."""
        versions = {"version": self._version, "engine": self._engines() or None}
        reply.respond(200, msgspec.json.encode(versions), told(request))

    async def metrics(self, request: Request, reply: Reply) -> None:
        """GET /metrics, for Prometheus."""
        page = self._metrics.page()
        reply.respond(200, page, content_type=b"text/plain; version=0.0.4; charset=utf-8")

    def _engines(self) -> str:
        """Versions of the engines, mostly one."""
        versions = (service.served.version() for service in self._models.services)
        return ", ".join(dict.fromkeys(version for version in versions if version))

    def _anthropic_model(self, name: str) -> dict[str, Any]:
        """As Anthropic's clients want it; theirs send a version."""
        served = self._models.find(name).served
        created = datetime.datetime.fromtimestamp(served.created, datetime.UTC).isoformat()
        told_of = {"type": "model", "id": name, "display_name": name, "created_at": created}
        return told_of | {"max_input_tokens": served.max_model_len()}

    def _model(self, name: str) -> dict[str, Any]:
        served = self._models.find(name).served
        told_of = {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "baton",
            "max_model_len": served.max_model_len(),
        }
        return told_of | ({} if name == served.name else {"parent": served.name})


def _standing(service: Service) -> str:
    """How a model is, in a word."""
    if service.draining or service.pool.unable:
        return "unavailable"
    return "degraded" if service.pool.missing or service.pool.troubles else "ready"


def _own_version() -> str:
    try:
        return importlib.metadata.version("baton")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"
