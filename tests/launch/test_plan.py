"""The plan gives every member a place of its own."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.compose import choices, read
from launch.errors import PlanError
from launch.plan import MEMBER_PORT, PORT_BLOCK, Member, Plan, check_hosts, dp_ranks, extend, plan
from launch.recipe import Kind, Recipe, Role, kind_of

RECIPES = choices("recipe")
CLUSTERS = choices("cluster")


def recipe(name: str, *overrides: str) -> Recipe:
    """A shipped recipe."""
    return read([f"+recipe={name}", *overrides]).recipe


@functools.cache
def shipped(name: str, cluster: str) -> Recipe:
    """A shipped recipe on a shipped cluster; composing takes longer than planning."""
    return recipe(name, f"cluster={cluster}")


@pytest.mark.parametrize("dedicated", [False, True])
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plans_on_every_cluster_or_says_what_is_missing(name: str, cluster: str, dedicated: bool) -> None:
    """A GPU recipe on a cluster without GPUs is the only refusal, and it names the key to set."""
    base = shipped(name, "local")
    control = replace(base.control, dedicated=dedicated)
    asked = replace(base, cluster=shipped("tiny_agg", cluster).cluster, control=control)
    if asked.engine.device == "cuda" and not asked.cluster.gpus_per_node:
        with pytest.raises(PlanError, match=r"cluster\.gpus_per_node=8"):
            plan(asked)
        return

    where = plan(asked)

    assert_consistent(where, asked)
    assert all(member.rank > 0 for member in where.members) or not dedicated


@pytest.mark.parametrize(
    ("name", "gpus", "ranks"),
    [
        pytest.param("llama70b_agg", 4, 1, id="TP4 on 4"),
        pytest.param("llama70b_agg", 8, 1, id="TP4 on 8"),
        pytest.param("llama70b_disagg", 8, 2, id="two TP8 on 8"),
        pytest.param("llama70b_disagg", 4, 4, id="two TP8 on 4"),
        pytest.param("llama70b_disagg", 6, 4, id="two TP8 on 6: four GPUs of each node"),
        pytest.param("llama70b_disagg_single_node", 8, 1, id="TP2 TP2 TP4 on 8"),
        pytest.param("llama70b_disagg_single_node", 6, 2, id="TP2 TP2 TP4 on 6"),
        pytest.param("llama70b_disagg_single_node", 4, 2, id="TP2 TP2 TP4 on 4"),
    ],
)
def test_nodes_follow_from_the_gpus_of_a_node(name: str, gpus: int, ranks: int) -> None:
    """Engines that fit share a node, those that do not span nodes."""
    assert plan(recipe(name, f"cluster=slurm_gpu{gpus}")).ranks == ranks


def test_an_engine_over_two_nodes_has_one_leader() -> None:
    """Only node 0 of an engine speaks for it; the members are named by their node."""
    where = plan(recipe("llama70b_disagg", "cluster=slurm_gpu4"))

    assert [(m.name, m.rank, m.leader) for m in where.members] == [
        ("prefill-0.0", 0, True),
        ("prefill-0.1", 1, False),
        ("decode-0.0", 2, True),
        ("decode-0.1", 3, False),
    ]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        pytest.param("llama70b_agg", ["tensor_parallel=5"], r"make it 4 or 8 together", id="TP5 on 4: one GPU of five nodes"),
        pytest.param("llama70b_agg", ["tensor_parallel=8", "nodes=3"], r"over 3 nodes of 4 GPUs.*6 or 9 together", id="3 nodes"),
        pytest.param("llama70b_agg", ["tensor_parallel=16", "nodes=2"], r"make it 8 together", id="too few nodes"),
        pytest.param("llama70b_agg", ["data_parallel=2", "tensor_parallel=8"], r"use replicas", id="DP of ranks over nodes"),
        pytest.param("llama70b_agg", ["data_parallel=6", "tensor_parallel=2", "nodes=4"], r"8 or 16 together", id="DP6 on 4 nodes"),
        pytest.param("tiny_agg", ["tensor_parallel=3", "nodes=2"], r"over 2 nodes.*2 or 4 together", id="CPU, TP3 on 2 nodes"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(
    name: str, overrides: list[str], message: str
) -> None:
    """The sizes in the message are the nearest that the same cluster takes."""
    with pytest.raises(PlanError, match=message):
        plan(recipe(name, "cluster=slurm_gpu4", *(f"roles.aggregated.{text}" for text in overrides)))


def test_data_parallel_ranks_over_nodes_are_served_by_each_node() -> None:
    """Every node's member leads, for the ranks that follow those of the node before; its ports are as many as its ranks."""
    asked = recipe("deepseek_dp16", "cluster=slurm_gpu8")
    where = plan(asked)

    assert [(m.name, m.leader, dp_ranks(asked.roles[0], m), m.dp_first, m.ports.ranks) for m in where.members] == [
        ("aggregated-0.0", True, (0, 8), 0, 8),
        ("aggregated-0.1", True, (8, 8), 8, 8),
    ]


def test_nodes_may_be_more_than_needed() -> None:
    """`nodes` spreads an engine that would fit one node."""
    where = plan(recipe("llama70b_agg", "cluster=slurm_gpu8", "roles.aggregated.nodes=2"))

    assert [(m.name, m.rank, m.slots) for m in where.members] == [
        ("aggregated-0.0", 0, (0, 1)),
        ("aggregated-0.1", 1, (0, 1)),
    ]


def test_a_wrong_number_of_hosts_names_the_number_to_ask_for() -> None:
    """The error carries the value that makes the next submission work."""
    where, asked = (
        plan(recipe("llama70b_disagg", "cluster=slurm_gpu8")),
        recipe("llama70b_disagg", "cluster=slurm_gpu8"),
    )
    with pytest.raises(PlanError, match="--nodes=2"):
        check_hosts(where, ["n1", "n2", "n3"], asked.cluster)


roles = st.builds(
    Role,
    kind=st.sampled_from([Kind.PREFILL, Kind.DECODE]),
    replicas=st.integers(1, 9),
    tensor_parallel=st.sampled_from([1, 2, 4, 8, 16]),
    pipeline_parallel=st.sampled_from([1, 2]),
    data_parallel=st.sampled_from([1, 1, 2, 8, 16]),
    nodes=st.sampled_from([None, None, 1, 2, 4]),
)


@given(roles, roles, st.sampled_from([4, 6, 8]), st.booleans())
def test_any_plan_is_consistent(first: Role, second: Role, gpus: int, dedicated: bool) -> None:
    """No slot and no port is given twice, no rank is empty, each engine has all of its slots and ranks; or it is refused."""
    base = shipped("llama70b_disagg", f"slurm_gpu{gpus}")
    asked = replace(
        base,
        models=(replace(base.models[0], roles=(replace(first, kind=Kind.PREFILL), replace(second, kind=Kind.DECODE))),),
        control=replace(base.control, dedicated=dedicated),
    )

    try:
        where = plan(asked)
    except PlanError as error:
        assert re.search(r"roles\.(prefill|decode): .*: (make it|use) |use replicas", str(error))  # noqa: PT017  # hypothesis
        return
    assert_consistent(where, asked)


@given(
    st.sampled_from([Kind.AGGREGATED, Kind.PREFILL]), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.integers(1, 4)
)
def test_any_plan_without_gpus_is_consistent(kind: Kind, replicas: int, tensor: int, per_node: int) -> None:
    """The same where a slot is an engine: one for each node that the engine spans."""
    base = shipped("tiny_disagg" if kind is Kind.PREFILL else "tiny_agg", "local")
    base = replace(base, cluster=replace(base.cluster, cpu_engines_per_node=per_node))
    wide = [replace(role, replicas=replicas, tensor_parallel=tensor, nodes=tensor) for role in base.roles]
    asked = replace(base, models=(replace(base.models[0], roles=tuple(wide)),))

    where = plan(asked)

    assert_consistent(where, asked)
    assert all(len(member.slots) == 1 and member.nodes == tensor for member in where.members)


def assert_consistent(where: Plan, asked: Recipe) -> None:
    """What holds of every plan."""
    slots = Counter((member.rank, slot) for member in where.members for slot in member.slots)
    assert set(slots.values()) == {1}
    assert max(slot for _, slot in slots) < where.slots_per_node
    ports = Counter(
        (member.rank, port) for member in where.members for port in range(member.ports.first, member.ports.end)
    )
    assert set(ports.values()) == {1}
    assert MEMBER_PORT <= min(port for _, port in ports) <= max(port for _, port in ports) < PORT_BLOCK
    first = 1 if asked.control.dedicated else 0
    assert {member.rank for member in where.members} == set(range(first, where.ranks))
    for role in asked.roles:
        engines = {member.engine for member in where.members if member.group == role.group}
        assert len(engines) == role.replicas
        for engine in engines:
            members = [member for member in where.members if member.engine == engine]
            assert [member.node for member in members] == list(range(members[0].nodes))
            assert [member.rank for member in members] == list(range(members[0].rank, members[0].rank + len(members)))
            if asked.engine.device == "cuda":
                assert sum(len(member.slots) for member in members) == role.world
            served = [rank for member in members if member.leader for rank in _ranks(role, member)]
            assert served == list(range(role.data_parallel))


def _ranks(role: Role, member: Member) -> range:
    first, count = dp_ranks(role, member)
    assert first == member.dp_first
    assert count == member.ports.ranks
    return range(first, first + count)


def test_planning_loads_nothing_heavy() -> None:
    """A login node composes and plans without torch, vLLM, ZMQ or transformers."""
    code = (
        "import sys; from launch.compose import read; from launch.plan import plan; from launch.dry_run import describe;"
        "asked = read(['+recipe=llama70b_disagg', 'cluster=slurm_gpu8']); plan(asked.recipe);"
        "print([name for name in ('torch', 'vllm', 'zmq', 'transformers', 'nixl') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "[]"


def test_several_models_share_nodes_and_have_names_of_their_own() -> None:
    """Engines are placed as those of one model would be; those of a model are called after its key."""
    where = plan(recipe("tiny_two_models", "models.chat.roles.aggregated.replicas=2"))

    assert [(member.name, member.model, member.rank, member.slots) for member in where.members] == [
        ("chat-aggregated-0", "chat", 0, (0,)),
        ("chat-aggregated-1", "chat", 0, (1,)),
        ("embed-embedding-0", "embed", 1, (0,)),
    ]
    assert where.engines("chat-aggregated") == ("chat-aggregated-0", "chat-aggregated-1")
    assert where.engines("aggregated") == ()


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4, 8]))


@given(pairs, pairs, st.sampled_from([4, 8]), st.booleans())
def test_any_plan_of_two_models_is_consistent(
    first: tuple[int, int, int], second: tuple[int, int, int], gpus: int, dedicated: bool
) -> None:
    """Two models with the same roles keep slots, ports and names apart, and what joins later belongs to one of them."""
    base = shipped("llama70b_disagg", f"slurm_gpu{gpus}")
    models = []
    for key, (prefills, decodes, tensor) in (("a", first), ("b-2", second)):
        counts = {Kind.PREFILL: prefills, Kind.DECODE: decodes}
        sized = [replace(role, replicas=counts[role.kind], tensor_parallel=tensor, model=key) for role in base.roles]
        model = replace(base.models[0].model, key=key, name=key)
        models.append(replace(base.models[0], model=model, roles=tuple(sized)))
    asked = replace(base, models=tuple(models), control=replace(base.control, dedicated=dedicated))
    where = plan(asked)
    added = extend(asked, [], {"b-2-decode": 2})
    after = plan(asked, [added])

    assert_consistent(where, asked)
    assert len({member.name for member in where.members}) == len(where.members)
    assert added.engines == (f"b-2-decode-{second[1]}", f"b-2-decode-{second[1] + 1}")
    assert after.members[: len(where.members)] == where.members
    assert {member.model for member in after.members[len(where.members) :]} == {"b-2"}
    with pytest.raises(PlanError, match="has no role decode: it has a-prefill, a-decode, b-2-prefill, b-2-decode"):
        extend(asked, [], {"decode": 1})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decode", "decode"),
        ("decode-0", "decode"),
        ("decode-0.1", "decode"),
        ("chat-decode", "decode"),
        ("chat-decode-12", "decode"),
        ("llama-3-decode-0.1", "decode"),
        ("decode-2-prefill-1", "prefill"),
        ("frontend-0", "frontend"),
    ],
)
def test_a_name_says_its_role(name: str, kind: str) -> None:
    """Whatever the key of its model looks like."""
    assert kind_of(name) == kind
