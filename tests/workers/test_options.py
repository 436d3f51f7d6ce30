"""What a user writes below `args` is known before it is queued, also where vLLM is not installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from launch.compose import read
from launch.errors import ConfigError
from launch.recipe import Recipe, Role
from workers.engine import vllm_names
from workers.engine.options import SERVED, ServingOptions, serving_options, split


def recipe(*overrides: str) -> Recipe:
    """A recipe whose model is not there, so that nothing but the options is looked at."""
    return read(["+recipe=tiny_disagg", "model.path=/nowhere", *overrides]).recipe


def role(asked: Recipe, kind: str) -> Role:
    """A role of it."""
    return next(role for role in asked.roles if role.kind == kind)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("engine.args.max_modle_len=1", r"engine\.args\.max_modle_len is no .*did you mean 'max_model_len'", id="typo"),
        pytest.param("engine.args.max-model-len=1", r"did you mean 'max_model_len'", id="as on vLLM's command line"),
        pytest.param("roles.decode.args.max_num_seq=1", r"roles\.decode\.args\.max_num_seq .*'max_num_seqs'", id="of a role"),
        pytest.param("engine.args.port=80", r"port is an option of vLLM's own API server", id="of the server we replace"),
        pytest.param("engine.args.nnodes=2", r"decided by the plan: use roles\.<role>\.nodes", id="nnodes"),
        pytest.param("engine.args.data_parallel_size=2", r"use roles\.<role>\.data_parallel", id="data_parallel_size"),
        pytest.param("engine.args.kv_transfer_config={}", r"use engine\.connector", id="kv_transfer_config"),
        pytest.param("engine.args.enable_expert_parallel=true", r"use roles\.<role>\.expert_parallel", id="expert parallel"),
        pytest.param("engine.args.tool_call_parser=hermees", r"'hermees' is no parser.*did you mean 'hermes'", id="tool parser"),
        pytest.param("engine.args.reasoning_parser=qwen4", r"'qwen4' is no parser.*did you mean 'qwen3'", id="reasoning parser"),
        pytest.param("engine.args.enable_auto_tool_choice=true", r"set engine\.args\.tool_call_parser", id="no parser"),
    ],
)  # fmt: skip
def test_what_vllm_would_refuse_is_refused_with_the_way_out(override: str, message: str) -> None:
    """Before the queue, not after it."""
    with pytest.raises(ConfigError, match=message):
        recipe(override)


def test_serving_options_are_split_from_engine_arguments() -> None:
    """The engine never sees what is not its own; the reasoning parser is for both."""
    engine, served = split(
        {
            "max_model_len": 10,
            "tool_call_parser": "hermes",
            "reasoning_parser": "qwen3",
            "chat_template": "t.jinja",
            "default_chat_template_kwargs": {"enable_thinking": False},
        }
    )

    assert engine == {"max_model_len": 10, "reasoning_parser": "qwen3"}
    assert served == ServingOptions(
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
        enable_auto_tool_choice=True,
        chat_template="t.jinja",
        default_chat_template_kwargs={"enable_thinking": False},
    )


def test_a_role_has_the_last_word() -> None:
    """Its own options win over those of all engines; auto tool choice can be switched off."""
    asked = recipe(
        "engine.args.tool_call_parser=hermes",
        "roles.decode.args.tool_call_parser=mistral",
        "roles.prefill.args.enable_auto_tool_choice=false",
    )

    assert serving_options(asked, role(asked, "decode")).tool_call_parser == "mistral"
    assert serving_options(asked, role(asked, "decode")).enable_auto_tool_choice
    assert not serving_options(asked, role(asked, "prefill")).enable_auto_tool_choice
    assert serving_options(recipe(), role(recipe(), "decode")) == ServingOptions()


def test_a_plugin_may_bring_a_reasoning_parser_of_its_own() -> None:
    """Its names cannot be known here."""
    asked = recipe("engine.args.reasoning_parser=ours", "engine.args.reasoning_parser_plugin=/p.py")

    assert serving_options(asked, asked.roles[0]).reasoning_parser == "ours"


def _engine_arguments() -> set[str]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return {item.name for item in dataclasses.fields(AsyncEngineArgs) if not item.name.startswith("_")}


def _server_options() -> set[str]:
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    return {item.name for item in dataclasses.fields(FrontendArgs)} - _engine_arguments()


def _tool_parsers() -> set[str]:
    from vllm.tool_parsers import ToolParserManager

    return set(ToolParserManager.list_registered())


def _reasoning_parsers() -> set[str]:
    from vllm.reasoning import ReasoningParserManager

    return set(ReasoningParserManager.list_registered())


def _connectors() -> set[str]:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    return set(KVConnectorFactory._registry)


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("table", "installed"),
    [
        (vllm_names.ENGINE_ARGUMENTS, _engine_arguments),
        (vllm_names.SERVER_OPTIONS, _server_options),
        (vllm_names.TOOL_PARSERS, _tool_parsers),
        (vllm_names.REASONING_PARSERS, _reasoning_parsers),
        (vllm_names.CONNECTORS, _connectors),
    ],
    ids=["engine arguments", "server options", "tool parsers", "reasoning parsers", "connectors"],
)
def test_the_tables_are_the_installed_vllm_s(table: frozenset[str], installed: Callable[[], set[str]]) -> None:
    """Another version of vLLM needs other tables."""
    import vllm

    assert vllm.__version__.startswith(vllm_names.VERSION)
    assert table == installed()


def test_every_serving_option_is_vllm_s() -> None:
    """We take names of vLLM's, and invent none."""
    assert vllm_names.ENGINE_ARGUMENTS | vllm_names.SERVER_OPTIONS >= SERVED
