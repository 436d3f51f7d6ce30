"""One trace from the client to both engines: the context of a request travels with its prefill and its decode."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.collector import collector
from tests.deployments import deployed

TRACE = "0af7651916cd43dd8448eb211c80319c"

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(400)]


def test_both_engines_spans_are_children_of_the_frontends(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As vLLM makes them where it is told to; the client's trace holds them all."""
    with collector() as traces:
        options = [
            *(f"model.path=tiny:{tiny_model}", f"frontend.otlp_endpoint={traces.url}"),
            f"engine.args.otlp_traces_endpoint={traces.url}",
            "engine.env.OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf",
        ]
        with deployed(tmp_path_factory.mktemp("traces"), "+recipe=tiny_disagg", *options, name="traces") as running:
            answer = running.http.post(
                f"{running.endpoint.url}/completions",
                json={"model": "tiny", "prompt": "stone " * 40, "max_tokens": 3},
                headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "X-Request-Id": "traced"},
            )
            span = answer.headers["traceparent"].split("-")[2]
            traces.wait_for(lambda found: sum(item.name == "llm_request" for item in traces.spans) >= 2)
        ours = [item for item in traces.spans if item.trace_id.hex() == TRACE]
        engines = [item for item in ours if item.name == "llm_request"]
        ids = {
            attribute.value.string_value
            for item in engines
            for attribute in item.attributes
            if attribute.key == "gen_ai.request.id"
        }

    assert answer.status_code == 200
    assert [item.name for item in ours if item.span_id.hex() == span] == ["POST /v1/completions"]
    assert [item.parent_span_id.hex() for item in engines] == [span, span]
    assert all(name.startswith("traced-cmpl-") for name in ids)
