"""What an engine cannot do, told before anything is queued; pure."""

from __future__ import annotations

from launch.errors import ConfigError, PlanError
from launch.plan import spread_of
from launch.recipe import Backend, Executor, Kind, Recipe, Role
from workers.engine.connectors import PULLED, check_connectors, children_of, kv_transfer_config
from workers.engine.model import Shape
from workers.engine.options import check_options, merged


def check_engines(recipe: Recipe, shape: Shape | None) -> None:
    """Refuse a recipe that vLLM would refuse, or serve wrongly.

    Args:
        recipe: The recipe.
        shape: Sizes of its model, None where they are not known yet; then what depends on them is left to vLLM.

    Raises:
        ConfigError: Says what does not go together, and what would.
    """
    check_options(recipe)
    check_connectors(recipe)
    if recipe.engine.backend is not Backend.VLLM:
        return
    for role in recipe.roles:
        if role.kind is Kind.ENCODE:
            _check_encode(role)
        if recipe.engine.device == "cpu":
            _check_cpu(role, shape)
        if shape:
            _check_model(recipe, role, shape)
    if recipe.disaggregated:
        _check_pair(recipe, shape)


def _check_encode(role: Role) -> None:
    """What an engine that only encodes cannot be (vLLM 0.32)."""
    where = f"roles.{role.kind}"
    if role.data_parallel > 1 or role.pipeline_parallel > 1:
        raise ConfigError(
            f"{where}: an engine that only encodes has one data-parallel rank and one stage: use {where}.replicas, or "
            f"{where}.tensor_parallel"
        )


def _check_cpu(role: Role, shape: Shape | None) -> None:
    """What vLLM 0.32's CPU backend fails at, each seen by running it."""
    where = f"roles.{role.kind}"
    if role.pipeline_parallel > 1:
        raise ConfigError(
            f"{where}.pipeline_parallel={role.pipeline_parallel}: vLLM's CPU backend cannot pipeline (it fails at the first "
            f"request): use {where}.tensor_parallel, or GPUs"
        )
    if role.expert_parallel:
        raise ConfigError(f"{where}.expert_parallel: vLLM's CPU backend crashes with it: leave it out, or use GPUs")
    if role.executor is Executor.RAY:
        raise ConfigError(f"{where}.executor=ray: vLLM's Ray executor needs GPUs: use executor=mp")
    if role.data_parallel > 1 and shape and shape.moe:
        raise ConfigError(
            f"{where}.data_parallel={role.data_parallel}: vLLM's CPU backend has no data parallelism for models with experts: "
            f"use {where}.replicas={role.replicas * role.data_parallel} instead, or GPUs"
        )


def _check_model(recipe: Recipe, role: Role, shape: Shape) -> None:
    where, tensor = f"roles.{role.kind}", role.tensor_parallel
    if shape.heads and shape.heads % tensor:
        fitting = [size for size in range(1, shape.heads + 1) if shape.heads % size == 0]
        near = [max(size for size in fitting if size < tensor), *[size for size in fitting if size > tensor][:1]]
        raise ConfigError(
            f"{where}.tensor_parallel={tensor} does not divide the model's {shape.heads} attention heads: "
            f"use {' or '.join(map(str, near))}"
        )
    if shape.layers and role.pipeline_parallel > shape.layers:
        raise ConfigError(
            f"{where}.pipeline_parallel={role.pipeline_parallel} is more than the model's {shape.layers} layers: "
            f"use at most {shape.layers}"
        )
    if shape.cross and merged(recipe, role).get("enable_prefix_caching") is not False:
        raise ConfigError(
            f"{where}: the engine of an encoder-decoder model ends at its first request with prefix caching on (vLLM 0.32): "
            "set engine.args.enable_prefix_caching=false"
        )
    if role.expert_parallel and not shape.moe:
        raise ConfigError(f"{where}.expert_parallel: the model has no experts (config.json names none): leave it out")
    if role.data_parallel > 1 and not shape.moe and _lone_ranks(recipe, role):
        raise ConfigError(
            f"{where}: with one data-parallel rank on each node vLLM wants a model with experts, and this one has none, so "
            f"its ranks share nothing: use {where}.replicas={role.replicas * role.data_parallel} and data_parallel=1"
        )


def _lone_ranks(recipe: Recipe, role: Role) -> bool:
    """Whether an engine spreads over nodes with a single data-parallel rank on each.

    With a dense model vLLM 0.32 starts that all the same, and then fails every request (seen on the CPU).
    """
    per_node = recipe.cluster.cpu_engines_per_node if recipe.engine.device == "cpu" else recipe.cluster.gpus_per_node
    try:
        spread = spread_of(role, recipe, per_node) if per_node else None
    except PlanError:
        return False  # the plan says why
    return spread is not None and spread.by_data and role.data_parallel == spread.nodes


def _check_pair(recipe: Recipe, shape: Shape | None) -> None:
    """The rules of NIXL's pull between a prefill and a decode engine (vLLM 0.32)."""
    roles = {role.kind: role for role in recipe.roles}
    prefill, decode = roles[Kind.PREFILL], roles[Kind.DECODE]
    carriers = [child["kv_connector"] for child in children_of(kv_transfer_config(recipe, Kind.PREFILL))]
    if not set(carriers) & PULLED:
        return
    for role in (prefill, decode):
        if role.pipeline_parallel > 1:
            raise ConfigError(
                f"roles.{role.kind}.pipeline_parallel={role.pipeline_parallel}: NIXL's pull does not work with pipelined "
                f"engines: use roles.{role.kind}.tensor_parallel={role.rank_world}, or aggregated engines"
            )
    large, small = sorted((prefill.tensor_parallel, decode.tensor_parallel), reverse=True)
    if large % small:
        raise ConfigError(
            f"tensor_parallel of prefill ({prefill.tensor_parallel}) and decode ({decode.tensor_parallel}) must divide one "
            f"another, or NIXL cannot map their heads: make one a multiple of the other"
        )
    if (
        shape
        and not shape.latent
        and shape.kv_heads
        and prefill.tensor_parallel > decode.tensor_parallel
        and prefill.tensor_parallel > shape.kv_heads
    ):
        raise ConfigError(
            f"roles.prefill.tensor_parallel={prefill.tensor_parallel} is more than the model's {shape.kv_heads} KV heads, "
            f"which are then kept in copies that decode engines of tensor_parallel={decode.tensor_parallel} cannot read: "
            f"use at most {max(shape.kv_heads, decode.tensor_parallel)} for prefill"
        )
