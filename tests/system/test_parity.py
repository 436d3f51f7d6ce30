"""Whatever a client may ask of plain vLLM, a deployment answers the same: aggregated, and with prefill and decode apart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments import Deployment, deployed
from tests.parity import CASES, UNARY_CASES, answer
from tests.reference import plain_vllm
from tests.shapes import SHAPE_CASES, TOKEN_CASES, shaped_answer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ALL = {**{(name, stream): case for stream in (False, True) for name, case in CASES.items()}} | {
    (name, False): case for name, case in UNARY_CASES.items()
}
PARSERS = {"tool_call_parser": "hermes", "reasoning_parser": "deepseek_r1"}
SHAPES = {"aggregated": "+recipe=tiny_agg", "disaggregated": "+recipe=tiny_disagg"}


@pytest.fixture(scope="module")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[int, Any]]:
    """What plain vLLM's server answers; it runs only while it is asked."""
    folder = tmp_path_factory.mktemp("plain")
    with (
        plain_vllm(tiny_model, folder, **PARSERS, enable_auto_tool_choice="") as base,
        httpx.Client(timeout=120) as http,
    ):
        found = {key: answer(http, base, case, key[1]) for key, case in ALL.items()}
        for name, case in SHAPE_CASES.items():
            found |= {(name, stream): shaped_answer(http, base, case, stream) for stream in (False, True)}
        found |= {
            (f"tokens: {name}", False): shaped_answer(http, base, case, False) for name, case in TOKEN_CASES.items()
        }
        return found


@pytest.fixture(scope="module", params=SHAPES)
def deployment(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    expected: dict[tuple[str, bool], tuple[int, Any]],
) -> Iterator[Deployment]:
    """Each shape in turn, after the plain server has ended."""
    parsers = [f"engine.args.{name}={value}" for name, value in PARSERS.items()]
    with deployed(
        tmp_path_factory.mktemp(request.param),
        SHAPES[request.param],
        *parsers,
        f"model.path=tiny:{tiny_model}",
        name=request.param,
    ) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "streamed"])
@pytest.mark.parametrize("name", CASES)
def test_it_answers_what_plain_vllm_answers(
    deployment: Deployment, expected: dict[tuple[str, bool], tuple[int, Any]], name: str, stream: bool
) -> None:
    """Text, reasons, usage, logprobs, tool calls: all but ids and times; and what vLLM refuses is refused."""
    case = CASES[name]
    found = answer(deployment.http, deployment.endpoint.url.removesuffix("/v1"), case, stream)

    assert expected[name, stream][0] == case.status
    assert found == expected[name, stream]


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "streamed"])
@pytest.mark.parametrize("name", SHAPE_CASES)
def test_responses_and_messages_are_plain_vllms(
    deployment: Deployment, expected: dict[tuple[str, bool], tuple[int, Any]], name: str, stream: bool
) -> None:
    """Items, blocks, events in their order, stop reasons, usage; and what vLLM refuses is refused."""
    case = SHAPE_CASES[name]
    found = shaped_answer(deployment.http, deployment.endpoint.url.removesuffix("/v1"), case, stream)

    assert expected[name, stream][0] == case.status
    assert found == expected[name, stream]


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_texts_and_tokens_are_plain_vllms(
    deployment: Deployment, expected: dict[tuple[str, bool], tuple[int, Any]], name: str
) -> None:
    """Ids, their strings, and counts; and the way back."""
    case = TOKEN_CASES[name]
    found = shaped_answer(deployment.http, deployment.endpoint.url.removesuffix("/v1"), case, False)

    assert expected[f"tokens: {name}", False][0] == case.status
    assert found == expected[f"tokens: {name}", False]


@pytest.mark.parametrize("name", UNARY_CASES)
def test_it_answers_what_plain_vllm_answers_whole_only(
    deployment: Deployment, expected: dict[tuple[str, bool], tuple[int, Any]], name: str
) -> None:
    """What vLLM does not stream."""
    found = answer(deployment.http, deployment.endpoint.url.removesuffix("/v1"), UNARY_CASES[name], False)

    assert found == expected[name, False]


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param({"kv_transfer_params": {"do_remote_prefill": True}}, id="as itself"),
        pytest.param({"ec_transfer_params": {"x": 1}}, id="an encoder's"),
        pytest.param({"vllm_xargs": {"kv_transfer_params": "x"}}, id="by the back door"),
    ],
)
def test_transfer_parameters_are_not_taken_from_a_client(deployment: Deployment, sent: dict[str, Any]) -> None:
    """They would end the engine, or bring it another prompt's tokens (vLLM 0.32); the worker lives on."""
    before = deployment.pids()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, **sent}
    refused = deployment.http.post(f"{deployment.endpoint.url}/completions", json=body)

    assert refused.status_code == 400
    assert "never taken from a client" in refused.json()["error"]["message"]
    assert deployment.client.completions.create(model="tiny", prompt="still there", max_tokens=3).choices
    assert deployment.pids() == before


def test_what_decode_refuses_costs_prefill_no_blocks(deployment: Deployment) -> None:
    """A grammar is compiled by the engine that answers; what was computed for it before is freed at once, not at the end
    of its lease."""
    computing = "prefill-0" if "prefill-0" in deployment.pids() else "aggregated-0"
    body = {"model": "tiny", "prompt": "stone " * 300, "structured_outputs": {"regex": "[a-"}}
    refused = deployment.http.post(f"{deployment.endpoint.url}/completions", json=body)
    asked = time.monotonic()
    while deployment.metric(computing, "baton_worker_kv_usage_ratio") > 0:
        assert time.monotonic() - asked < 10
        time.sleep(0.05)

    assert refused.status_code == 400
    assert deployment.metric(computing, "baton_worker_nixl_expired_leases_total") == 0
