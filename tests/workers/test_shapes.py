"""Messages and responses as workers write them: blocks in order, and the same wherever a stream was cut and gone on with."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.base import Piece
from workers.engine.shapes import writer
from workers.runtime.wire import Render, Shape

HEADS = {
    Shape.MESSAGE: '{"id":"msg_1","type":"message","role":"assistant","model":"m",',
    Shape.RESPONSE: '{"id":"resp_1","object":"response","model":"m",',
}
WHOLE = [Shape.MESSAGE, Shape.RESPONSE]
shapes = st.sampled_from(WHOLE)


def said(delta: dict[str, Any], finish: str | None = None) -> Piece:
    """A piece of one token with a chat's delta."""
    return Piece((1,), "", finish, message=msgspec.json.encode(delta))


def call(number: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    """A delta of a tool call; a name begins it."""
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {"tool_calls": [{"index": number, "function": function} | ({"id": "chatcmpl-tool-1"} if name else {})]}


@st.composite
def answers(draw: st.DrawFn) -> list[dict[str, Any]]:
    """The deltas of an answer as parsers give them: some reasoning, some text, some calls, white space between these."""
    texts = st.lists(st.text(min_size=1, max_size=5), max_size=3)
    found: list[dict[str, Any]] = [{"reasoning": text} for text in draw(texts)]
    found += [{"content": text} for text in draw(texts)]
    for number in range(draw(st.integers(0, 2))):
        found.append(call(number, "", f"tool{number}"))
        found += [call(number, part) for part in ('{"a"', ": 1}")]
        found += [{"content": text} for text in draw(st.lists(st.just("\n"), max_size=1))]
    return found or [{"content": "x"}]


def events(stream: bytes) -> list[dict[str, Any]]:
    """The events of a stream, which say their type twice alike."""
    found = []
    for event in stream.decode().split("\n\n")[:-1]:
        kind, data = event.split("\n", 1)
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


def streamed(shape: Shape, deltas: list[dict[str, Any]], cut: int | None = None) -> list[dict[str, Any]]:
    """The events of an answer, which another worker goes on with after `cut` tokens if that is given."""
    render = Render(shape, True, False, HEADS[shape], "", 0)
    pieces = [said(delta) for delta in deltas] + [said({}, "stop")]
    first = writer(render, 10)
    if cut is None:
        return events(b"".join(map(first.delta, pieces[:-1])) + first.end(pieces[-1]))
    sent = b"".join(map(first.delta, pieces[:cut]))
    rest = pieces[cut:]
    rest[0].before = [said(delta) for delta in deltas[:cut]]
    second = writer(render, 10, cut)
    return events(sent + b"".join(map(second.delta, rest[:-1])) + second.end(rest[-1]))


@given(shapes, answers(), st.data())
def test_a_stream_that_another_worker_goes_on_with_is_the_same(
    shape: Shape, deltas: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Names of blocks, numbers of events, usage and all; whatever was being said when it was cut."""
    cut = data.draw(st.integers(1, len(deltas)))

    assert streamed(shape, deltas, cut) == streamed(shape, deltas)


@given(answers())
def test_a_responses_events_add_up_to_what_its_last_one_says(deltas: list[dict[str, Any]]) -> None:
    """Each item is added, grows by its deltas, and is done; no number is left out."""
    found = streamed(Shape.RESPONSE, deltas)
    output = found[-1]["response"]["output"]
    grown: dict[int, str] = {}
    for event in found:
        if event["type"].endswith(".delta"):
            grown[event["output_index"]] = grown.get(event["output_index"], "") + event["delta"]
    texts = [item["arguments"] if "arguments" in item else item["content"][0]["text"] for item in output]

    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["item"] for event in found if event["type"] == "response.output_item.done"] == output
    assert [grown.get(number, "") for number in range(len(output))] == texts
    assert len({item["id"] for item in output}) == len(output)
    assert found[-1]["response"]["usage"]["output_tokens"] == len(deltas) + 1


@given(answers())
def test_a_messages_blocks_begin_grow_and_end_one_after_the_other(deltas: list[dict[str, Any]]) -> None:
    """And text that comes within a tool call does not tear it."""
    found = streamed(Shape.MESSAGE, deltas)
    blocks = [event for event in found if event["type"].startswith("content_block")]
    order = [(event["index"], event["type"]) for event in blocks if not event["type"].endswith("delta")]
    count = len(order) // 2
    calls = {event["index"] for event in blocks if event.get("content_block", {}).get("type") == "tool_use"}
    arguments = {
        index: "".join(
            event["delta"]["partial_json"] for event in blocks if event["index"] == index and "delta" in event
        )
        for index in calls
    }

    assert [found[0]["type"], found[-2]["type"], found[-1]["type"]] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    assert order == [(index, f"content_block_{what}") for index in range(count) for what in ("start", "stop")]
    assert set(arguments.values()) <= {'{"a": 1}'}
    assert found[-2]["delta"]["stop_reason"] == ("tool_use" if calls else "end_turn")


@pytest.mark.parametrize(
    ("finish", "stop", "deltas", "expected"),
    [
        pytest.param("length", None, [{"content": "x"}], ("max_tokens", None), id="cut"),
        pytest.param("stop", None, [{"content": "x"}], ("end_turn", None), id="end"),
        pytest.param("stop", 7, [{"content": "x"}], ("end_turn", None), id="stop token"),
        pytest.param("stop", "END", [{"content": "x"}], ("stop_sequence", "END"), id="stop string"),
        pytest.param("stop", None, [call(0, "{}", "f")], ("tool_use", None), id="call"),
        pytest.param("stop", "}", [call(0, '{"a": ', "f")], ("stop_sequence", "}"), id="call cut short"),
        pytest.param("length", None, [call(0, "{}", "f")], ("max_tokens", None), id="call at the limit"),
    ],
)
def test_a_message_tells_why_it_ended(
    finish: str, stop: Any, deltas: list[dict[str, Any]], expected: tuple[str, str | None]
) -> None:
    """In Anthropic's words, streamed or not."""
    message: dict[str, Any] = {"role": "assistant", **{name: item for delta in deltas for name, item in delta.items()}}
    for stream in (False, True):
        made = writer(Render(Shape.MESSAGE, stream, False, HEADS[Shape.MESSAGE], "", 0), 10)
        pieces = [said(delta) for delta in deltas] if stream else []
        last = Piece((1,), "", finish, stop, message=b"{}" if stream else msgspec.json.encode(message))
        got = b"".join(map(made.delta, pieces)) + made.end(last)
        told = events(got)[-2]["delta"] if stream else json.loads(got)

        assert (told["stop_reason"], told["stop_sequence"]) == expected


@pytest.mark.parametrize("shape", WHOLE)
def test_a_unary_answer_is_what_a_stream_adds_up_to(shape: Shape) -> None:
    """One JSON object: text without a parser joins up, and calls that a model wrote wrongly are told as they are."""
    made = writer(Render(shape, False, False, HEADS[shape], "", 0), 10, 0, 4)
    texts = [Piece((1, 2), "one "), Piece((3,), "two", "stop")]
    whole = json.loads(b"".join((made.delta(texts[0]), made.end(texts[1]))))
    broken = msgspec.json.encode({"content": "", **call(0, "{oops", "f")})
    torn = json.loads(
        writer(Render(shape, False, False, HEADS[shape], "", 0)).end(Piece((1,), "", "stop", message=broken))
    )

    if shape is Shape.MESSAGE:
        assert whole["content"] == [{"type": "text", "text": "one two"}]
        assert whole["usage"] == {"input_tokens": 6, "cache_read_input_tokens": 4, "output_tokens": 3}
        assert torn["content"][0]["input"] == {"arguments": "{oops"}
    else:
        assert whole["output"][0]["content"][0]["text"] == "one two"
        assert whole["usage"]["input_tokens_details"]["cached_tokens"] == 4
        assert whole["usage"]["total_tokens"] == 13
        assert torn["output"][0]["arguments"] == "{oops"
