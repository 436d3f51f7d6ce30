"""An engine's arguments and environment, computed from the recipe; pure, so that a dry run shows what will be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from launch.plan import Member, Plan
from launch.recipe import Kind, Recipe, Role

# Seconds that a prefill engine keeps the blocks of a prompt for its decode; vLLM's own default (0.32).
KV_LEASE_S = 30

KV_ROLE = {Kind.PREFILL: "kv_producer", Kind.DECODE: "kv_consumer"}


class Place(Protocol):
    """Where a rank is: known once it runs, a symbol in a dry run."""

    @property
    def address(self) -> str:
        """What other ranks connect to."""
        ...

    def port(self, offset: int) -> str:
        """A port of the rank's block."""
        ...


def role_of(recipe: Recipe, member: Member) -> Role:
    """The role that a member belongs to."""
    return next(role for role in recipe.roles if role.kind is member.kind)


def engine_arguments(recipe: Recipe, plan: Plan, member: Member, places: Mapping[int, Place]) -> dict[str, Any]:
    """vLLM's engine arguments for one member, by vLLM 0.32's names; what the recipe says wins.

    Prefill and decode get the same model string and block size: vLLM compares the first in the handshake and silently
    returns wrong tokens when the second differs.
    """
    role = role_of(recipe, member)
    arguments: dict[str, Any] = {
        "model": recipe.model.path,
        "served_model_name": recipe.model.name,
        "tensor_parallel_size": role.tensor_parallel,
        "pipeline_parallel_size": role.pipeline_parallel,
        "enable_prefix_caching": True,
    }
    if member.nodes > 1:
        leader = plan.leader_of(member.engine)
        arguments |= {
            "nnodes": member.nodes,
            "node_rank": member.node,
            "master_addr": places[leader.rank].address,
            "master_port": places[leader.rank].port(leader.ports.rendezvous),
        }
    if member.kind in KV_ROLE:
        arguments["kv_transfer_config"] = {
            "kv_connector": "NixlConnector",
            "kv_role": KV_ROLE[member.kind],
            "kv_buffer_device": recipe.engine.device,
            "kv_load_failure_policy": "fail",  # recompute would let a broken fabric pass for a slow one
            "kv_connector_extra_config": {"kv_lease_duration": KV_LEASE_S},
        }
    given = dict(recipe.engine.args) | dict(role.args)
    serving = ("tool_call_parser", "enable_auto_tool_choice", "chat_template", "default_chat_template_kwargs")
    return arguments | {name: value for name, value in given.items() if name not in serving}


def engine_environment(
    recipe: Recipe, member: Member, place: Place, visible: Sequence[str] | None = None
) -> dict[str, str]:
    """What a member's environment has beyond the agent's own; what the recipe says wins.

    `visible` are the GPUs that the rank was given, where somebody restricted them.
    """
    role = role_of(recipe, member)
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONHASHSEED": "0",  # block hashes must agree between engines
        "VLLM_HOST_IP": place.address,
        "VLLM_NIXL_SIDE_CHANNEL_HOST": place.address,  # vLLM's default is localhost, which no other node can reach
        "VLLM_NIXL_SIDE_CHANNEL_PORT": place.port(member.ports.side_channel),
    }
    if recipe.engine.device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[slot] if visible else str(slot) for slot in member.slots)
    else:
        env |= {
            "CUDA_VISIBLE_DEVICES": "",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            # One process less for each engine: the model runs in the engine core instead of a worker of its own.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TORCHDYNAMO_DISABLE": "1",
        }
    return env | dict(recipe.engine.env) | dict(role.env)
