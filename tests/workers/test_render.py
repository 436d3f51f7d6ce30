"""Rendered bytes are what OpenAI's clients read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.base import Piece
from workers.engine.render import Choice, chunk
from workers.runtime.wire import Render, Shape

HEAD = '{"id":"x","object":"o","created":1,"model":"m",'


def events(stream: bytes) -> list[Any]:
    """The JSON of each event."""
    return [json.loads(event.removeprefix("data: ")) for event in stream.decode().split("\n\n") if event]


@given(st.lists(st.text(), min_size=1, max_size=8), st.sampled_from([Shape.CHAT, Shape.COMPLETION]), st.booleans())
def test_the_deltas_of_a_stream_join_to_the_text(texts: list[str], shape: Shape, include_usage: bool) -> None:
    """Whatever the text; the last event alone has a finish reason."""
    tail = ',"usage":null}' if include_usage else "}"
    choice = Choice(Render(shape, True, False, HEAD, tail, 3))
    stream = b"".join(choice.delta(said(text)) for text in texts[:-1]) + choice.end(said(texts[-1], "stop"))
    found = [event["choices"][0] for event in events(stream)]
    pieces = [item["delta"].get("content", "") if shape is Shape.CHAT else item["text"] for item in found]

    assert "".join(pieces) == "".join(texts)
    assert [item["finish_reason"] for item in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["finish_reason"] == "stop"
    assert {item["index"] for item in found} == {3}
    assert all(("usage" in event) is include_usage for event in events(stream))


@given(st.lists(st.text(), min_size=1, max_size=8), st.sampled_from([Shape.CHAT, Shape.COMPLETION]))
def test_chunks_hold_what_a_plain_stream_says(texts: list[str], shape: Shape) -> None:
    """Byte for byte, whatever the lengths of the texts, also when one comes again."""
    plain, chunked = (Choice(Render(shape, True, framed, HEAD, "}", 0)) for framed in (False, True))
    pieces = [said(text) for text in (*texts, *texts)]

    assert unchunked(b"".join(map(chunked.delta, pieces))) == b"".join(map(plain.delta, pieces))


def unchunked(data: bytes) -> bytes:
    """The payload of chunks, each of which has to say its size exactly."""
    payload = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        payload, data = payload + rest[:length], rest[length + 2 :]
    return payload


@given(st.lists(st.text(), min_size=1, max_size=8), st.sampled_from([Shape.CHAT, Shape.COMPLETION]))
def test_a_unary_choice_holds_the_whole_text(texts: list[str], shape: Shape) -> None:
    """And nothing was written before its end."""
    choice = Choice(Render(shape, False, False, HEAD, "}", 0))
    early = b"".join(choice.delta(said(text)) for text in texts[:-1])
    whole = json.loads(choice.end(said(texts[-1], "length", 7)))

    assert early == b""
    assert (whole["message"]["content"] if shape is Shape.CHAT else whole["text"]) == "".join(texts)
    assert (whole["finish_reason"], whole["stop_reason"]) == ("length", 7)


def test_a_chat_stream_opens_with_the_role_once() -> None:
    """Also when its only event is its last; a resumed one does not open again."""
    fresh = Choice(Render(Shape.CHAT, True, False, HEAD, "}", 0))
    resumed = Choice(Render(Shape.CHAT, True, False, HEAD, "}", 0), produced=3)
    roles = [
        event["choices"][0]["delta"].get("role")
        for event in events(fresh.delta(said("a")) + fresh.end(said("", "stop")))
    ]

    assert roles == ["assistant", None, None]
    assert "role" not in events(resumed.end(said("a", "stop")))[0]["choices"][0]["delta"]


def test_events_may_count_the_tokens_so_far() -> None:
    """From what another worker had produced on; the opening event counts none of its own."""
    choice = Choice(Render(Shape.CHAT, True, False, HEAD, "}", 0, usage=True), prompt_tokens=5)
    found = events(choice.delta(said("a")) + choice.delta(said("")) + choice.end(said("b", "stop")))
    later = Choice(Render(Shape.COMPLETION, True, False, HEAD, "}", 0, usage=True), prompt_tokens=5, produced=10)

    assert [event["usage"]["completion_tokens"] for event in found] == [0, 1, 3]
    assert {event["usage"]["prompt_tokens"] for event in found} == {5}
    assert events(later.delta(said("c")))[0]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 11,
        "total_tokens": 16,
    }


def said(text: str, finish: str | None = None, stop_reason: int | None = None) -> Piece:
    """A step of one token."""
    return Piece((1,), text, finish, stop_reason)


@pytest.mark.parametrize("size", [1, 15, 16, 255, 4096])
def test_a_chunk_says_its_size_in_hexadecimal(size: int) -> None:
    """RFC 9112, section 7.1."""
    head, _, rest = chunk(b"x" * size).partition(b"\r\n")

    assert int(head, 16) == size
    assert rest == b"x" * size + b"\r\n"
