"""What a user may write below `engine.args` and `roles.<role>.args`, and whom it is for.

Most are vLLM's engine arguments, by its own names. A few are options of vLLM's API server that our workers take over:
which parser reads tool calls, which chat template is used. Pure, and in no need of vLLM: names come from `vllm_names`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from launch.errors import ConfigError, closest
from launch.recipe import Recipe, Role
from workers.engine.vllm_names import ENGINE_ARGUMENTS, REASONING_PARSERS, SERVER_OPTIONS, TOOL_PARSERS, VERSION

# What the recipe decides, and the key that decides it; given apart from it these would contradict the plan.
OWNED: dict[str, str] = {
    "model": "model.path",
    "served_model_name": "model.name",
    "tensor_parallel_size": "roles.<role>.tensor_parallel",
    "pipeline_parallel_size": "roles.<role>.pipeline_parallel",
    "enable_expert_parallel": "roles.<role>.expert_parallel",
    "distributed_executor_backend": "roles.<role>.executor",
    "kv_transfer_config": "engine.connector",
    "kv_events_config": "engine.kv_events",
    "ec_transfer_config": "roles.encode",
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port"), "roles.<role>.nodes"),
    **dict.fromkeys(
        (name for name in ENGINE_ARGUMENTS if name.startswith("data_parallel_")), "roles.<role>.data_parallel"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How a role's workers turn tokens into answers; the names and meanings are those of vLLM's API server.

    `chat_template` is a path or the template itself, as the user wrote it; null takes the model's.
    """

    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    enable_auto_tool_choice: bool = False
    chat_template: str | None = None
    default_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


SERVED = frozenset(item.name for item in fields(ServingOptions))


def merged(recipe: Recipe, role: Role) -> dict[str, Any]:
    """What the user wrote for a role: its own options over those of all engines."""
    return {**recipe.engine.args, **role.args}


def split(args: Mapping[str, Any]) -> tuple[dict[str, Any], ServingOptions]:
    """Engine arguments and serving options.

    `reasoning_parser` goes to both: the engine holds structured output back until the reasoning has ended.
    """
    engine = {name: value for name, value in args.items() if name in ENGINE_ARGUMENTS}
    served = {name: value for name, value in args.items() if name in SERVED and value is not None}
    auto = served.pop("enable_auto_tool_choice", served.get("tool_call_parser") is not None)
    return engine, ServingOptions(**served, enable_auto_tool_choice=bool(auto))


def serving_options(recipe: Recipe, role: Role) -> ServingOptions:
    """The serving options of a role."""
    return split(merged(recipe, role))[1]


def check_options(recipe: Recipe) -> None:
    """Refuse names and parsers that vLLM does not know, and what the recipe decides elsewhere.

    Raises:
        ConfigError: Names the key, and the nearest name that would do.
    """
    for where, args in (("engine", recipe.engine.args), *((f"roles.{role.kind}", role.args) for role in recipe.roles)):
        for name in args:
            _check_name(f"{where}.args.{name}", name)
    for role in recipe.roles:
        args = merged(recipe, role)
        _check_parser(role, args, "tool_call_parser", TOOL_PARSERS)
        if not args.get("reasoning_parser_plugin"):  # a plugin brings names that we cannot know
            _check_parser(role, args, "reasoning_parser", REASONING_PARSERS)
        if args.get("enable_auto_tool_choice") and not args.get("tool_call_parser"):
            raise ConfigError(
                f"roles.{role.kind}: enable_auto_tool_choice needs a parser that finds the calls: "
                "set engine.args.tool_call_parser"
            )


def _check_name(key: str, name: str) -> None:
    if name in OWNED:
        raise ConfigError(f"{key} is decided by the plan: use {OWNED[name]}")
    if name in ENGINE_ARGUMENTS or name in SERVED:
        return
    if name in SERVER_OPTIONS:
        raise ConfigError(
            f"{key} is an option of vLLM's own API server, in whose place Baton's frontend stands: leave it out "
            f"(see frontend in conf/schema.py); of that server's options {', '.join(sorted(SERVED))} are taken"
        )
    raise ConfigError(
        f"{key} is no engine argument of vLLM {VERSION}{closest(name.replace('-', '_'), ENGINE_ARGUMENTS | SERVED)}"
    )


def _check_parser(role: Role, args: Mapping[str, Any], name: str, known: Collection[str]) -> None:
    value = args.get(name)
    if value and value not in known:
        raise ConfigError(
            f"roles.{role.kind}: {name}={value!r} is no parser of vLLM {VERSION}{closest(str(value), known)}; "
            f"there are {', '.join(sorted(known))}"
        )
