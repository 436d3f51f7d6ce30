"""Each connector becomes the kv_transfer_config that vLLM wants, or is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.compose import read
from launch.errors import ConfigError
from launch.plan import plan
from launch.recipe import Kind, Recipe
from launch.records import RunDirectory
from workers.engine.connectors import kv_transfer_config, lease_s, require_packages, with_engine_id

NIXL = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_producer",
    "kv_buffer_device": "cpu",
    "kv_connector_extra_config": {"backends": ["UCX"], "kv_lease_duration": 30},
}
LMCACHE = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
KVBM = {
    "kv_connector": "DynamoConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "kvbm.vllm_integration.connector",
}
OFFLOAD = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 1000},
}
FAIL = {"kv_load_failure_policy": "fail"}


def recipe(name: str, connector: object, *overrides: str) -> Recipe:
    """A recipe with a connector, written as on the command line."""
    return read([f"+recipe={name}", "model.path=/nowhere", f"engine.connector={written(connector)}", *overrides]).recipe


def written(value: object) -> str:
    """A value in the notation of the command line: no quotes around keys."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(written, value)) + "]" if isinstance(value, list) else str(value)


@pytest.mark.parametrize(
    ("connector", "expected"),
    [
        pytest.param("nixl", FAIL | NIXL, id="nixl"),
        pytest.param(["nixl"], FAIL | NIXL, id="a list of one"),
        pytest.param(
            ["nixl", "lmcache"],
            {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_producer",
                **FAIL,
                "kv_connector_extra_config": {"connectors": [NIXL, LMCACHE]},
            },
            id="nixl and lmcache",
        ),
        pytest.param(
            ["kvbm", "nixl"],
            {
                "kv_connector": "MultiConnector",
                "kv_role": "kv_producer",
                **FAIL,
                "kv_connector_extra_config": {"connectors": [KVBM, NIXL]},
            },
            id="kvbm and nixl, as Dynamo has them",
        ),
        pytest.param(NIXL, FAIL | NIXL, id="verbatim"),
    ],
)
def test_between_prefill_and_decode(connector: object, expected: dict[str, Any]) -> None:
    """The prefill engine's configuration; the order of a list is kept."""
    assert kv_transfer_config(recipe("tiny_disagg", connector), Kind.PREFILL) == expected


@pytest.mark.parametrize(
    ("connector", "expected"),
    [
        pytest.param("nixl", None, id="nothing to carry"),
        pytest.param("none", None, id="none"),
        pytest.param("lmcache", FAIL | LMCACHE, id="lmcache"),
        pytest.param("kvbm", FAIL | KVBM, id="kvbm"),
        pytest.param(["nixl", "lmcache"], FAIL | LMCACHE, id="the carrier is left out"),
        pytest.param(OFFLOAD, FAIL | OFFLOAD, id="offloading, verbatim"),
        pytest.param(
            {"kv_connector": "MooncakeConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"},
            {"kv_connector": "MooncakeConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"},
            id="mooncake, verbatim, with a word of its own",
        ),
    ],
)
def test_in_aggregated_engines(connector: object, expected: dict[str, Any] | None) -> None:
    """They offload and share; they carry nothing to each other."""
    assert kv_transfer_config(recipe("tiny_agg", connector), Kind.AGGREGATED) == expected


def test_the_recipe_s_keys_reach_nixl() -> None:
    """Backends of the cluster, lease and failure policy of the engine; the decode side consumes."""
    asked = recipe(
        "tiny_disagg",
        "nixl",
        "cluster.nixl_backends=[LIBFABRIC]",
        "engine.kv_lease_s=60",
        "engine.kv_load_failure=recompute",
    )

    assert kv_transfer_config(asked, Kind.DECODE) == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_consumer",
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"backends": ["LIBFABRIC"], "kv_lease_duration": 60},
    }


@pytest.mark.parametrize(
    ("name", "connector", "overrides", "message"),
    [
        pytest.param("tiny_disagg", "nixle", [], r"did you mean 'nixl'", id="typo"),
        pytest.param("tiny_disagg", "none", [], r"has none that does \(none\): use engine\.connector=nixl", id="none"),
        pytest.param("tiny_disagg", "lmcache", [], r"none that does \(LMCacheConnectorV1\)", id="no carrier"),
        pytest.param("tiny_disagg", ["nixl", NIXL], [], r"has 2 that do", id="two carriers"),
        pytest.param("tiny_disagg", "mooncake", [], r"speaks the pull protocol of NIXL only", id="mooncake as carrier"),
        pytest.param(
            "tiny_disagg", {"kv_connector": "NixlPushConnector", "kv_role": "kv_both"}, [], r"pull protocol", id="push"
        ),
        pytest.param("tiny_agg", "mooncake", [], r"MooncakeStoreConnector", id="mooncake without prefill and decode"),
        pytest.param("tiny_agg", ["none", "lmcache"], [], r"a list of names", id="none and another"),
        pytest.param("tiny_agg", "3", [], r"connector's name, a list of names, or a mapping, got 3", id="a number"),
        pytest.param("tiny_agg", {"kv_role": "kv_both"}, [], r"needs kv_connector", id="no name"),
        pytest.param(
            "tiny_agg",
            {"kv_connector": "OfloadingConnector", "kv_role": "kv_both"},
            [],
            r"did you mean 'OffloadingConnector'",
            id="unknown",
        ),
        pytest.param("tiny_agg", {"kv_connector": "OffloadingConnector"}, [], r"kv_role of .* got None", id="no role"),
        pytest.param(
            "tiny_agg",
            {"kv_connector": "MultiConnector", "kv_role": "kv_both"},
            [],
            r"needs kv_connector_extra_config\.connectors",
            id="an empty multi",
        ),
        pytest.param(
            "tiny_disagg", "nixl", ["engine.args.kv_offloading_size=4"], r"in the place of engine\.connector", id="vLLM's own"
        ),
        pytest.param("tiny_disagg", "nixl", ["engine.kv_lease_s=1"], r"at least 6", id="lease"),
        pytest.param("tiny_disagg", "nixl", ["engine.kv_load_failure=retry"], r"one of fail, recompute", id="policy"),
        pytest.param("tiny_disagg", "nixl", ["cluster.nixl_backends=[ucx]"], r"did you mean 'UCX'", id="backend"),
        pytest.param("tiny_disagg", "nixl", ["cluster.nixl_backends=[]"], r"list of UCX, LIBFABRIC", id="no backend"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(name: str, connector: object, overrides: list[str], message: str) -> None:
    """With the reason, and what would work."""
    with pytest.raises(ConfigError, match=message):
        recipe(name, connector, *overrides)


@pytest.mark.parametrize("connector", ["nixl", ["nixl", "lmcache"], OFFLOAD, [OFFLOAD, "lmcache"]], ids=str)
def test_a_connector_reaches_the_ranks_as_it_was_written(tmp_path: Path, connector: object) -> None:
    """Through the recipe's file in the run directory."""
    asked = recipe("tiny_agg", connector)
    run = RunDirectory(tmp_path / "run")
    run.prepare(asked, plan(asked), attempt=1)

    assert run.recipe() == asked


def test_json_text_is_taken_as_vllm_s_command_line_takes_it() -> None:
    """As it is found in other people's scripts."""
    asked = read(["+recipe=tiny_agg", "model.path=/nowhere", f"engine.connector='{json.dumps(OFFLOAD)}'"]).recipe

    assert kv_transfer_config(asked, Kind.AGGREGATED) == FAIL | OFFLOAD


def test_a_missing_package_is_named_with_its_install_line() -> None:
    """Also that of a child of a MultiConnector."""
    config = {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {"connectors": [OFFLOAD, KVBM]},
    }
    with pytest.raises(ConfigError, match=r"DynamoConnector needs the Python package 'kvbm'.*pip install kvbm"):
        require_packages(config)
    require_packages(OFFLOAD)
    require_packages(None)


def test_the_lease_is_found_in_any_depth() -> None:
    """Workers tell frontends how long a prefill's blocks are kept."""
    multi = {
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {
            "connectors": [LMCACHE, NIXL | {"kv_connector_extra_config": {"kv_lease_duration": 7}}]
        },
    }

    assert lease_s(NIXL, 1) == 30
    assert lease_s(multi, 1) == 7
    assert lease_s(LMCACHE, 1) == 1
    assert lease_s(None, 1) == 1


def test_all_nodes_of_an_engine_have_one_engine_id_in_each_life() -> None:
    """The same from the same words, another after a restart; one that the user gave stays."""
    first = with_engine_id(NIXL, "1/decode-0")

    assert first == with_engine_id(NIXL, "1/decode-0")
    assert first["engine_id"] != with_engine_id(NIXL, "2/decode-0")["engine_id"]
    assert with_engine_id(NIXL | {"engine_id": "mine"}, "1")["engine_id"] == "mine"


def test_an_offloading_connector_tells_what_it_has_where_routing_wants_to_know() -> None:
    """Alone and beside another; a recipe's own word stays, and without KV events nothing is added."""
    extra = "kv_connector_extra_config"

    def told(connector: object, events: bool = True) -> dict[str, Any]:
        config = kv_transfer_config(
            recipe("tiny_disagg", ["nixl", connector], f"engine.kv_events={events}"), Kind.PREFILL
        )
        assert config
        found: dict[str, Any] = config[extra]["connectors"][1]
        return found

    assert told(OFFLOAD)[extra] == {"self_describing_kv_events": True, "cpu_bytes_to_use": 1000}
    assert told(OFFLOAD, events=False) == OFFLOAD
    own = OFFLOAD | {extra: {"cpu_bytes_to_use": 1000, "self_describing_kv_events": False}}
    assert told(own) == own
