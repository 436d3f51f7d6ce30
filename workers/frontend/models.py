"""The models that a deployment serves, and how a request finds its own.

A request names its model: what clients call it, or one of the LoRA adapters of one. Each model has workers, a tokenizer, a
router and a queue of its own (`service.Service`); of another model's a request sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from workers.frontend.errors import ApiError
from workers.frontend.links import Link
from workers.frontend.service import Service


class Asks(Protocol):
    """What is looked at of a request."""

    model: Any  # text, or None where its API lets it be left out


class Workers:
    """The links to the workers of one model, as they were at the last `follow`."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._links: list[Link] = []

    def follow(self, links: Iterable[Link]) -> None:
        """These are all workers that there are now."""
        self._links = [link for link in links if link.card.model == self.model]

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    @property
    def context(self) -> int:
        """The shortest context among them; 0 while there is none."""
        return min((link.card.max_model_len for link in self._links), default=0)

    @property
    def version(self) -> str:
        """Of their engine; empty while there is none."""
        return next((link.card.version for link in self._links), "")


class Models:
    """All models, by name."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = tuple(services)
        self._named = {service.served.name: service for service in services}

    @property
    def names(self) -> list[str]:
        """What can be asked for now: of each model that can answer its own name and those of its adapters."""
        able = [service for service in self.services if not service.pool.unable]
        return [name for service in able for name in (service.served.name, *service.served.adapters())]

    def find(self, name: str | None) -> Service:
        """The model of a name, which may be left out where there is but one.

        Raises:
            ApiError: 404, no model has it; 400, none is given and there are several; 503, nobody is there to say which
                adapters there are.
        """
        service = self._named.get(name) if name else None
        if service is not None:
            return service
        if not name:
            if len(self.services) == 1:
                return self.services[0]
            raise ApiError(400, f"model is missing: this deployment serves {self._listed()}", "model")
        for service in self.services:
            if name in service.served.adapters():
                return service
        raise ApiError(404, f"the model {name!r} does not exist; this deployment serves {self._listed()}", "model")

    def admit(self, ask: Asks, generates: bool) -> Service:
        """Find the model of a request and refuse what cannot be answered now; a name that was left out is filled in.

        Raises:
            ApiError: 404, 400 or 503.
        """
        try:
            service = self.find(ask.model)
        except ApiError:
            for each in self.services:  # may be the name of an adapter that nobody is there to tell of
                if ask.model and each.pool.unable and not each.pool.pooling:
                    raise ApiError(503, each.reason(each.pool.unable), retry_after_s=1) from None
            raise
        ask.model = ask.model or service.served.name
        service.admit(ask.model, generates)
        return service

    def owner(self, name: str) -> str | None:
        """The model whose name this is, or that of one of its adapters."""
        for service in self.services:
            if name == service.served.name or name in service.served.adapters():
                return service.served.name
        return None

    def drain(self) -> None:
        """Refuse what is new from now on: the deployment stops."""
        for service in self.services:
            service.draining = True

    @property
    def draining(self) -> bool:
        """Whether it does."""
        return self.services[0].draining

    def _listed(self) -> str:
        return ", ".join(
            repr(name) for service in self.services for name in (service.served.name, *service.served.adapters())
        )
