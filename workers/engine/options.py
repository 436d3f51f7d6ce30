"""Options that vLLM's API server takes beside the engine's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from launch.recipe import Recipe, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How a worker reads what its model says."""

    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    enable_auto_tool_choice: bool = False
    chat_template: str | None = None
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def serving_options(recipe: Recipe, role: Role) -> ServingOptions:
    """What the recipe says of them."""
    given = {**recipe.engine.args, **role.args}
    names = [item.name for item in fields(ServingOptions)]
    found = {name: given[name] for name in names if name in given}
    found.setdefault("enable_auto_tool_choice", "tool_call_parser" in found)
    return ServingOptions(**found)
