"""A table of routes: which method and path is answered by what, and what a document of them says."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from workers.frontend.errors import ApiError

# Takes a Request and a Reply, and the parameters of the path in order.
Handler = Callable[..., Awaitable[None]]
PARAMETER = re.compile(r"\{(\w+)\}")


class Access(StrEnum):
    """Which key a route asks for."""

    OPEN = "open"
    API = "api"
    ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One method of one path. In `path`, {model} stands for any text, as names of models have slashes, other names for one
    step of the path. `body` is the type of a JSON body, `query` what may follow the path, both for the document."""

    method: str
    path: str
    handler: Handler
    summary: str
    access: Access = Access.API
    body: type[msgspec.Struct] | None = None
    form: dict[str, Any] | None = None
    query: tuple[str, ...] = ()
    streams: bool = False
    content: str = "application/json"
    anthropic: bool = False

    @property
    def parameters(self) -> list[str]:
        """Names of the path's parameters."""
        return PARAMETER.findall(self.path)


class Routes:
    """All routes, by what a request asks for."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.all = tuple(routes)
        self._exact: dict[str, dict[str, Route]] = {}
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, Route]]] = {}
        for route in self.all:
            if route.parameters:
                self._patterns.setdefault(route.path, (_pattern(route.path), {}))[1][route.method] = route
            else:
                self._exact.setdefault(route.path, {})[route.method] = route

    def find(self, method: str, path: str) -> tuple[Route, tuple[str, ...]]:
        """The route of a request, and the parameters in its path.

        Raises:
            ApiError: 404 or 405.
        """
        methods, parameters = self._methods(path)
        if methods is None:
            raise ApiError(404, f"there is no route {path}")
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            allowed = ", ".join(methods)
            raise ApiError(405, f"{path} takes {allowed}, not {method}", allow=allowed)
        return route, parameters

    def _methods(self, path: str) -> tuple[dict[str, Route] | None, tuple[str, ...]]:
        exact = self._exact.get(path)
        if exact is not None:
            return exact, ()
        for pattern, methods in self._patterns.values():
            match = pattern.fullmatch(path)
            if match:
                return methods, match.groups()
        return None, ()


def _pattern(path: str) -> re.Pattern[str]:
    steps = PARAMETER.split(path)
    written = [
        re.escape(step) if at % 2 == 0 else "(.+)" if step == "model" else "([^/]+)" for at, step in enumerate(steps)
    ]
    return re.compile("".join(written))
