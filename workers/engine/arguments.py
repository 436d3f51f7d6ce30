"""An engine's arguments and environment, computed from the recipe; pure, so that a dry run shows what will be used."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from launch.plan import Member, Plan, dp_ranks
from launch.recipe import EQUAL, Executor, Kind, Recipe, Role
from workers.engine.connectors import ec_transfer_config, kv_transfer_config
from workers.engine.options import merged, split

# Seconds that a prefill engine keeps the blocks of a prompt for its decode; vLLM's own default (0.32).
KV_LEASE_S = 30
KV_TOPIC = "kv"


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
    return next(role for role in recipe.roles if role.group == member.group)


def engine_arguments(
    recipe: Recipe,
    plan: Plan,
    member: Member,
    places: Mapping[int, Place],
    encoder_cache: str = "<run directory>/encoder_cache",
) -> dict[str, Any]:
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
        **_over_nodes(role, plan, member, places),
    }
    if role.data_parallel > 1:
        arguments["data_parallel_size"] = role.data_parallel
    if role.expert_parallel:
        arguments["enable_expert_parallel"] = True
    if role.executor is Executor.RAY:
        arguments["distributed_executor_backend"] = "ray"
    transfer = kv_transfer_config(recipe, member.kind)
    if transfer:
        arguments["kv_transfer_config"] = transfer
    encoded = ec_transfer_config(recipe, member.kind, encoder_cache)
    if encoded:
        arguments["ec_transfer_config"] = encoded
    if recipe.publishes_kv_events and member.kind not in (Kind.EMBEDDING, Kind.ENCODE):
        arguments["kv_events_config"] = _kv_events(member, places[member.rank])
    return arguments | split(merged(recipe, role))[0]


def _over_nodes(role: Role, plan: Plan, member: Member, places: Mapping[int, Place]) -> dict[str, Any]:
    """How the members of one engine find each other; nothing for an engine of one node, or where Ray does it."""
    if member.nodes == 1 or role.executor is Executor.RAY:
        return {}
    head = plan.leader_of(member.engine)
    address, port = places[head.rank].address, places[head.rank].port
    if member.by_data:
        # vLLM's hybrid load balancing: each node's own AsyncLLM serves the ranks of that node. With one rank on each node
        # vLLM 0.32 turns it into its external mode by itself.
        first, count = dp_ranks(role, member)
        return {
            "data_parallel_hybrid_lb": True,
            "data_parallel_size_local": count,
            "data_parallel_start_rank": first,
            "data_parallel_address": address,
            "data_parallel_rpc_port": port(head.ports.data_parallel),
        }
    return {
        "nnodes": member.nodes,
        "node_rank": member.node,
        "master_addr": address,
        "master_port": port(head.ports.rendezvous),
    }


def _kv_events(member: Member, place: Place) -> dict[str, Any]:
    """Publish KV events. vLLM 0.32 binds to a wildcard only (it would connect to any other address), and adds the
    data-parallel rank, counted over all nodes, to both ports by itself."""
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{place.port(member.ports.kv_events - member.dp_first)}",
        "replay_endpoint": f"tcp://*:{place.port(member.ports.kv_replay - member.dp_first)}",
        "topic": KV_TOPIC,
    }


def kv_event_sources(role: Role, member: Member, place: Place) -> dict[int, tuple[str, str]]:
    """Where to subscribe to a member's KV events and where to ask for those that were missed, by data-parallel rank."""
    first, count = dp_ranks(role, member)
    return {
        first + local: (
            f"tcp://{place.address}:{place.port(member.ports.kv_events + local)}",
            f"tcp://{place.address}:{place.port(member.ports.kv_replay + local)}",
        )
        for local in range(count)
    }


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
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # an allowed host must not send us to another
        "PYTHONHASHSEED": "0",  # block hashes must agree between engines
        "VLLM_HOST_IP": place.address,
        "VLLM_NIXL_SIDE_CHANNEL_HOST": place.address,  # vLLM's default is localhost, which no other node can reach
        # vLLM adds the data-parallel rank, counted over all nodes of the engine.
        "VLLM_NIXL_SIDE_CHANNEL_PORT": place.port(member.ports.side_channel - member.dp_first),
    }
    if recipe.engine.device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[slot] if visible else str(slot) for slot in member.slots)
    else:
        env |= {
            "CUDA_VISIBLE_DEVICES": "",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
        }
        if role.world == 1:
            # One process less for each engine: the model runs in the engine core instead of a worker of its own.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env | dict(recipe.engine.env) | dict(role.env)


def fingerprint(recipe: Recipe, role: Role, vllm_version: str) -> str:
    """What must be equal on both sides of a KV transfer, in 16 hexadecimal digits."""
    args = merged(recipe, role)
    children = [name if isinstance(name, str) else dict(name) for name in recipe.engine.connector]
    facts = [vllm_version, recipe.model.path, *(args.get(name) for name in EQUAL), children]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
