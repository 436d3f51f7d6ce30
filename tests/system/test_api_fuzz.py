"""Requests that nobody would send, made from the document of the routes: none of them is the server's fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.deployments import Deployment

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
# Enough to reach the engines, and not so much that they would be what is tested.
MODEL, MAX_TOKENS, MAX_CHOICES = "tiny", 5, 3
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.fixture(scope="module")
def operations(echo: Deployment) -> Iterator[tuple[list[Any], requests.Session, str]]:
    """All operations of the document, a session with the key, and the base URL."""
    base = echo.endpoint.url.removesuffix("/v1")
    schema = schemathesis.openapi.from_dict(echo.http.get(f"{base}/openapi.json").json())
    found: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {echo.run.api_key()}"
        yield found, session, base


def test_every_operation_is_in_the_document(operations: tuple[list[Any], requests.Session, str]) -> None:
    """Whatever a client can call, but for the operators' routes, which have a key of their own."""
    paths = {operation.path for operation in operations[0]}

    assert {"/v1/chat/completions", "/v1/messages", "/v1/responses/{response_id}", "/v1/batches", "/tokenize"} <= paths
    assert len(operations[0]) > 40


def test_nothing_that_is_sent_is_the_servers_fault(operations: tuple[list[Any], requests.Session, str]) -> None:
    """What fits the document, and what does not."""
    fuzz(operations, examples=4)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_nothing_that_is_sent_for_long_is_the_servers_fault(
    operations: tuple[list[Any], requests.Session, str],
) -> None:
    """The same, many times over."""
    fuzz(operations, examples=25)


def fuzz(operations: tuple[list[Any], requests.Session, str], examples: int) -> None:
    """Send that many requests of every operation, right ones and wrong ones each."""
    found, session, base = operations
    for operation in found:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue  # there is nothing in it that could be wrong
            _send(operation, mode, examples, session, base)


def _send(operation: Any, mode: GenerationMode, examples: int, session: requests.Session, base: str) -> None:
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode), known=st.booleans())
    def send(case: Any, known: bool) -> None:
        if known and isinstance(case.body, dict):
            case.body = _reaching(case.body)
        answered = case.call(base_url=base, session=session, timeout=30)
        case.validate_response(answered, checks=CHECKS)

    send()


def _reaching(body: dict[str, Any]) -> dict[str, Any]:
    """The same for a model that is there, with a short answer where it is right."""
    limits = {name: MAX_TOKENS for name in LIMITS if isinstance(body.get(name), int)}
    choices = {"n": MAX_CHOICES} if isinstance(body.get("n"), int) and MAX_CHOICES < body["n"] <= 64 else {}
    given_limit = {} if limits else {"max_tokens": MAX_TOKENS}
    return {**body, **given_limit, **limits, **choices, "model": MODEL}
