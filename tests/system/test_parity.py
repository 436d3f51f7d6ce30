"""Whatever a client may ask of plain vLLM, a deployment answers the same: aggregated, and with prefill and decode apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployments import Deployment, deployed
from tests.parity import CASES, UNARY_CASES, answer
from tests.reference import plain_vllm

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
        return {key: answer(http, base, case, key[1]) for key, case in ALL.items()}


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


@pytest.mark.parametrize("name", UNARY_CASES)
def test_it_answers_what_plain_vllm_answers_whole_only(
    deployment: Deployment, expected: dict[tuple[str, bool], tuple[int, Any]], name: str
) -> None:
    """What vLLM does not stream."""
    found = answer(deployment.http, deployment.endpoint.url.removesuffix("/v1"), UNARY_CASES[name], False)

    assert found == expected[name, False]
