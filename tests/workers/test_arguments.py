"""An engine gets the arguments and the environment that its place in the plan asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.compose import read
from launch.errors import ConfigError, LaunchError
from launch.plan import Plan, plan
from launch.recipe import Recipe
from slurm.hosts import refuse_loopback
from slurm.places import Place
from workers.engine import ray_cluster
from workers.engine.arguments import engine_arguments, engine_environment, fingerprint, kv_event_sources, role_of
from workers.engine.checks import check_engines
from workers.engine.model import Shape, read_shape, shape_of

PLACES = {rank: Place(f"10.0.0.{rank + 1}", 20000 + 256 * rank) for rank in range(4)}


def planned(name: str, *overrides: str) -> tuple[Recipe, Plan]:
    """A shipped recipe and its plan."""
    asked = read([f"+recipe={name}", *overrides]).recipe
    return asked, plan(asked)


def arguments(name: str, member: str, *overrides: str) -> dict[str, Any]:
    """The engine arguments of a member."""
    asked, where = planned(name, *overrides)
    return engine_arguments(asked, where, where.member(member), PLACES)


def environment(name: str, member: str, *overrides: str) -> dict[str, str]:
    """The environment of a member."""
    asked, where = planned(name, *overrides)
    found = where.member(member)
    return engine_environment(asked, found, PLACES[found.rank])


def test_the_nodes_of_one_engine_differ_in_their_rank_alone() -> None:
    """They meet at node 0's address, at a port of node 0's block."""
    overrides = ("cluster=slurm_gpu8",)
    first, second = (arguments("llama405b_agg", f"aggregated-0.{node}", *overrides) for node in (0, 1))

    assert first["node_rank"] == 0
    assert second == first | {"node_rank": 1}
    assert {name: first[name] for name in ("nnodes", "master_addr", "master_port", "tensor_parallel_size")} == {
        "nnodes": 2,
        "master_addr": "10.0.0.1",
        "master_port": "20019",
        "tensor_parallel_size": 8,
    }


def test_data_parallel_ranks_over_nodes_use_hybrid_load_balancing() -> None:
    """Each node serves its own ranks; all shake hands with node 0."""
    second = arguments("deepseek_dp16", "aggregated-0.1", "cluster=slurm_gpu8")

    assert {name: value for name, value in second.items() if "parallel" in name} == {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 16,
        "data_parallel_size_local": 8,
        "data_parallel_start_rank": 8,
        "data_parallel_hybrid_lb": True,
        "data_parallel_address": "10.0.0.1",
        "data_parallel_rpc_port": "20020",
        "enable_expert_parallel": True,
    }
    assert "nnodes" not in second


def test_vllm_s_count_of_ranks_leads_to_the_ports_of_the_plan() -> None:
    """vLLM adds the rank over all nodes to a port; what it then binds is in the member's own block, and what we look for."""
    overrides = ("cluster=slurm_gpu8", "engine.kv_events=true")
    asked, where = planned("deepseek_dp16", *overrides)
    member = where.member("aggregated-0.1")
    given = arguments("deepseek_dp16", member.name, *overrides)["kv_events_config"]
    side_channel = int(environment("deepseek_dp16", member.name, *overrides)["VLLM_NIXL_SIDE_CHANNEL_PORT"])
    base = int(given["endpoint"].rpartition(":")[2])
    replay = int(given["replay_endpoint"].rpartition(":")[2])
    bound = {rank: (f"tcp://10.0.0.2:{base + rank}", f"tcp://10.0.0.2:{replay + rank}") for rank in range(8, 16)}
    taken = [side_channel + rank for rank in range(8, 16)] + [base + rank for rank in range(8, 16)]

    assert kv_event_sources(role_of(asked, member), member, PLACES[1]) == bound
    assert len(set(taken)) == 16
    assert all(PLACES[1].base < port < PLACES[1].base + 256 for port in taken)
    assert given["publisher"] == "zmq"
    assert given["enable_kv_cache_events"]
    assert given["endpoint"].startswith("tcp://*:")


@pytest.mark.parametrize(("word", "expected"), [("null", False), ("false", False), ("true", True)])
@pytest.mark.parametrize("member", ["prefill-0", "decode-0"])
def test_kv_events_are_published_where_they_are_asked_for(member: str, word: str, expected: bool) -> None:
    """By both sides alike; where there is one worker to choose, the router needs none."""
    assert ("kv_events_config" in arguments("tiny_disagg", member, f"engine.kv_events={word}")) is expected


def test_a_role_s_arguments_win() -> None:
    """Over those of all engines, and these over ours."""
    found = arguments(
        "tiny_disagg", "decode-0", "roles.decode.args.max_num_seqs=4", "engine.args.enable_prefix_caching=false"
    )

    assert found["max_num_seqs"] == 4
    assert found["enable_prefix_caching"] is False
    assert found["block_size"] == 32


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        pytest.param("tiny_agg", True, id="one process"),
        pytest.param("tiny_tp2", False, id="TP2"),
        pytest.param("tiny_tp2_2nodes", False, id="TP2 over nodes"),
        pytest.param("tiny_dp2", False, id="DP2"),
    ],
)
def test_only_an_engine_of_one_process_runs_in_its_core(name: str, alone: bool) -> None:
    """vLLM's single-process executor cannot hold a second one."""
    asked, where = planned(name)
    env = engine_environment(asked, where.members[0], PLACES[0])

    assert ("VLLM_ENABLE_V1_MULTIPROCESSING" in env) is alone


def test_addresses_are_those_of_the_member_s_own_node() -> None:
    """vLLM and NIXL are told, for their own guess is localhost or the wrong interface."""
    env = environment("llama70b_disagg", "decode-0", "cluster=slurm_gpu8")

    assert env["VLLM_HOST_IP"] == env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.0.0.2"


@pytest.mark.parametrize(
    ("here", "there", "refused"),
    [
        pytest.param(("n1", "127.0.0.1"), ("n1", "127.0.0.1"), False, id="one machine"),
        pytest.param(("n1", "10.0.0.1"), ("n2", "10.0.0.2"), False, id="two nodes"),
        pytest.param(("n1", "127.0.0.1"), ("n2", "10.0.0.2"), True, id="ours"),
        pytest.param(("n1", "10.0.0.1"), ("n2", "127.0.1.1"), True, id="theirs"),
    ],
)
def test_loopback_between_nodes_is_refused(here: tuple[str, str], there: tuple[str, str], refused: bool) -> None:
    """An address that leads back to whoever uses it fails later and elsewhere."""
    if refused:
        with pytest.raises(LaunchError, match=r"set cluster\.interface"):
            refuse_loopback(here, there)
    else:
        refuse_loopback(here, there)


@pytest.mark.parametrize(
    "change",
    [
        "engine.args.dtype=bfloat16",
        "engine.args.kv_cache_dtype=fp8",
        "engine.args.block_size=64",
        "engine.args.revision=main",
        "model.path=/other",
        "engine.connector=[nixl, lmcache]",
    ],
)
def test_what_a_kv_transfer_needs_equal_changes_the_fingerprint(change: str) -> None:
    """And nothing else does: both roles of one recipe have the same, whatever else differs."""
    asked, _ = planned("tiny_disagg", "roles.decode.args.max_num_seqs=4")
    prefill, decode = asked.roles
    other, _ = planned("tiny_disagg", change)
    known = fingerprint(asked, prefill, "0.32.0")

    assert known == fingerprint(asked, decode, "0.32.0")
    assert known != fingerprint(other, other.roles[0], "0.32.0")
    assert known != fingerprint(asked, prefill, "0.33.0")


@pytest.mark.parametrize(
    "override",
    [
        "roles.decode.args.dtype=bfloat16",
        "roles.decode.args.kv_cache_dtype=fp8",
        "roles.prefill.args.revision=main",
        "roles.decode.args.prefix_caching_hash_algo=sha256_cbor",
        "roles.decode.args.hf_overrides={a: 1}",
        "roles.decode.env.PYTHONHASHSEED=1",
    ],
)
def test_prefill_and_decode_must_agree(override: str) -> None:
    """vLLM compares some of these when it is too late, and others never."""
    with pytest.raises(ConfigError, match="must agree on"):
        planned("tiny_disagg", override)


LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 80}
DEEPSEEK = {"num_attention_heads": 128, "num_hidden_layers": 61, "n_routed_experts": 256, "kv_lora_rank": 512}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(LLAMA, Shape(heads=32, kv_heads=8, layers=80), id="Llama"),
        pytest.param(DEEPSEEK, Shape(heads=128, kv_heads=128, layers=61, experts=256, latent=True), id="DeepSeek"),
        pytest.param({"text_config": LLAMA}, Shape(heads=32, kv_heads=8, layers=80), id="multimodal"),
        pytest.param({"block_configs": [{"block_type": "moe", "n_routed_experts": 4}]}, Shape(experts=4), id="blocks"),
        pytest.param({}, Shape(), id="says nothing"),
    ],
)
def test_a_model_s_shape_is_read_from_its_configuration(config: Mapping[str, Any], expected: Shape) -> None:
    """As vLLM finds it."""
    assert shape_of(config) == expected


def test_a_model_that_is_not_there_yet_has_no_shape(tmp_path: Path) -> None:
    """A broken file is an error."""
    assert read_shape(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("name", "overrides", "config", "message"),
    [
        pytest.param("llama70b_agg", ["tensor_parallel=5"], LLAMA, r"32 attention heads: use 4 or 8", id="heads"),
        pytest.param("llama70b_agg", ["pipeline_parallel=99"], LLAMA, r"80 layers: use at most 80", id="layers"),
        pytest.param("llama70b_agg", ["expert_parallel=true"], LLAMA, r"no experts", id="experts of a dense model"),
        pytest.param("llama70b_agg", ["data_parallel=4", "tensor_parallel=8"], LLAMA, r"replicas=4 and data_parallel=1", id="dense DP over nodes"),
        pytest.param("tiny_agg", ["pipeline_parallel=2"], None, r"CPU backend cannot pipeline", id="PP on the CPU"),
        pytest.param("tiny_agg", ["expert_parallel=true"], None, r"CPU backend crashes", id="EP on the CPU"),
        pytest.param("tiny_agg", ["executor=ray"], None, r"needs GPUs", id="Ray on the CPU"),
        pytest.param("tiny_agg", ["data_parallel=2"], DEEPSEEK, r"no data parallelism for models with experts", id="MoE DP on the CPU"),
pytest.param("tiny_agg", ["data_parallel=2", "nodes=2"], LLAMA, r"replicas=2 and data_parallel=1", id="a rank on each node"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    name: str, overrides: list[str], config: Mapping[str, Any] | None, message: str
) -> None:
    """With what would."""
    shape = shape_of(config) if config else None
    written = [f"roles.aggregated.{text}" for text in overrides]
    with pytest.raises(ConfigError, match=message):
        check_engines(read([f"+recipe={name}", "cluster=slurm_gpu8", "model.path=/nowhere", *written]).recipe, shape)


@pytest.mark.parametrize(
    ("prefill", "decode", "config", "message"),
    [
        pytest.param("tensor_parallel=2", "tensor_parallel=4", LLAMA, None, id="2 to 4"),
        pytest.param("tensor_parallel=8", "tensor_parallel=2", LLAMA, None, id="8 to 2, a KV head for each"),
        pytest.param("tensor_parallel=16", "tensor_parallel=8", LLAMA, r"use at most 8 for prefill", id="copies of KV heads"),
        pytest.param("tensor_parallel=16", "tensor_parallel=8", DEEPSEEK, None, id="latent KV is the same everywhere"),
        pytest.param("tensor_parallel=16", "tensor_parallel=8", None, None, id="unknown model"),
        pytest.param("tensor_parallel=6", "tensor_parallel=4", None, r"must divide one another", id="6 to 4"),
        pytest.param("tensor_parallel=2", "pipeline_parallel=2", None, r"does not work with pipelined", id="PP"),
    ],
)  # fmt: skip
def test_nixl_s_rules_for_pairs(
    prefill: str, decode: str, config: Mapping[str, Any] | None, message: str | None
) -> None:
    """Which sizes of prefill and decode engines can pass a KV cache on."""
    pair = ("roles.prefill.tensor_parallel=1", "roles.decode.tensor_parallel=1")
    overrides = ("cluster=slurm_gpu8", *pair, f"roles.prefill.{prefill}", f"roles.decode.{decode}")
    if message:
        with pytest.raises(ConfigError, match=message):
            check_engines(planned("llama70b_disagg", *overrides)[0], shape_of(config) if config else None)
    else:
        check_engines(planned("llama70b_disagg", *overrides)[0], shape_of(config) if config else None)


def test_ray_gets_a_cluster_of_the_engine_s_own_nodes() -> None:
    """The head on node 0, a node that joins it on the other; every server at a port of the plan."""
    overrides = ("cluster=slurm_gpu4", "roles.aggregated.executor=ray", "roles.aggregated.tensor_parallel=8")
    asked, where = planned("llama70b_agg", *overrides)
    head, joined = (ray_cluster.start_command(where, member, PLACES, "/t/ray") for member in where.members)

    assert head[1:] == (
        *("-m", "ray.scripts.scripts", "start", "--head", "--port=20024"),
        *("--include-dashboard=false", "--temp-dir=/t/ray", "--node-ip-address=10.0.0.1", "--num-gpus=4"),
        *("--node-manager-port=20025", "--object-manager-port=20026", "--runtime-env-agent-port=20027"),
        *("--metrics-export-port=20028", "--dashboard-agent-grpc-port=20029", "--dashboard-agent-listen-port=20030"),
        *("--disable-usage-stats", "--block"),
    )
    assert joined[3:6] == ("start", "--address=10.0.0.1:20024", "--node-ip-address=10.0.0.2")
    found = engine_arguments(asked, where, where.members[0], PLACES)
    assert found["distributed_executor_backend"] == "ray"
    assert "nnodes" not in found


def test_ray_with_data_parallelism_is_refused() -> None:
    """Ray's own data parallelism is another thing than ours."""
    with pytest.raises(ConfigError, match="use executor=mp"):
        planned("deepseek_dp16", "cluster=slurm_gpu8", "roles.aggregated.executor=ray")


def test_a_missing_ray_is_named_with_its_install_line() -> None:
    """The environment of the tests has none, as most have not."""
    with pytest.raises(ConfigError, match=r"pip install 'ray"):
        ray_cluster.require_ray()


def test_encode_engines_hand_on_what_they_made_to_those_that_compute_prompts() -> None:
    """Through one folder; they keep no KV cache to move, and decode engines take no part."""
    encode, prefill, decode = (arguments("tiny_vlm_encode", f"{name}-0") for name in ("encode", "prefill", "decode"))

    assert encode["ec_transfer_config"]["ec_role"] == "ec_producer"
    assert prefill["ec_transfer_config"] == encode["ec_transfer_config"] | {"ec_role": "ec_consumer"}
    assert "ec_transfer_config" not in decode
    assert "kv_transfer_config" not in encode
    assert arguments("tiny_vlm", "aggregated-0").get("ec_transfer_config") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["roles.encode.data_parallel=2"], "use roles.encode.replicas", id="data parallel"),
        pytest.param(["roles.encode.replicas=1", "roles.aggregated.replicas=0"], "none that answer", id="alone"),
        pytest.param(["engine.args.ec_transfer_config={}"], "use roles.encode", id="by vLLM's own option"),
        pytest.param(["engine.encoder_cache_gb=-1"], "at least 0", id="no room"),
    ],
)
def test_encode_engines_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    """With the way out."""
    with pytest.raises(LaunchError, match=message):
        planned("tiny_vlm", "roles.encode.replicas=1", *overrides)


def test_engines_follow_no_redirection_to_media() -> None:
    """An allowed host must not send them to one that is not."""
    assert environment("tiny_vlm", "aggregated-0")["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
