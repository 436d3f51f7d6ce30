"""Render an answer as a message of Anthropic's API, unary or as its events.

Source of the formats: https://docs.anthropic.com/en/api/messages and /messages-streaming; where that leaves room, as
vLLM 0.32's own server has it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from workers.engine.base import Piece
from workers.engine.blocks import Block, Blocks, Kind, logprobs_of, said_by
from workers.engine.render import chunk
from workers.runtime.wire import Render

_json = msgspec.json.Encoder().encode


class Message:
    """The writer of one message; `shapes.writer` says what the arguments mean."""

    def __init__(self, render: Render, prompt_tokens: int, produced: int, cached_tokens: int) -> None:
        self._render = render
        self._blocks = Blocks(render.head)
        self._begun = produced > 0
        self._prompt_tokens = prompt_tokens
        self._tokens = produced
        self._cached_tokens = cached_tokens
        self._text: list[str] = []

    def delta(self, piece: Piece) -> bytes:
        """Bytes for the client after a step that is not the last; none for a unary answer."""
        self._tokens += len(piece.ids)
        if not self._render.stream:
            self._text.append(piece.text)
            return b""
        self._catch_up(piece)
        events = self._events(piece)
        return framed(self._opening(piece) + events, self._render) if events else b""

    def end(self, piece: Piece) -> bytes:
        """Bytes for the client at the end: the last events, or the whole of a unary answer."""
        self._tokens += len(piece.ids)
        if not self._render.stream:
            return self._whole(piece)
        self._catch_up(piece)
        events = self._opening(piece) + self._events(piece, last=True) + self._closing()
        stop, sequence = self._stop(piece)
        events += event(
            "message_delta",
            {"delta": {"stop_reason": stop, "stop_sequence": sequence}, "usage": self._usage(piece)},
        )
        return framed(events + event("message_stop", {}), self._render)

    def _catch_up(self, piece: Piece) -> None:
        for sent in piece.before:
            self._events(sent)

    def _opening(self, piece: Piece) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        rest: dict[str, Any] = {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(piece, tokens=0),
        }
        message = msgspec.Raw(self._render.head.encode() + _json(rest)[1:])
        return event("message_start", {"message": message})

    def _events(self, piece: Piece, last: bool = False) -> bytes:
        events, before = b"", self._blocks.open
        for block, added in self._blocks.additions(piece, last):
            if block is not before:
                events += self._stopped(before) if before else b""
                events += event("content_block_start", {"index": block.index, "content_block": self._opened(block)})
                before = block
            if added:
                events += event("content_block_delta", {"index": block.index, "delta": _added(block, added)})
        return events

    def _closing(self) -> bytes:
        closed = self._blocks.close()
        return self._stopped(closed) if closed else b""

    def _stopped(self, block: Block) -> bytes:
        signed = b""
        if block.kind is Kind.REASONING:
            delta = {"type": "signature_delta", "signature": self._blocks.name(block, "sig")}
            signed = event("content_block_delta", {"index": block.index, "delta": delta})
        return signed + event("content_block_stop", {"index": block.index})

    def _opened(self, block: Block) -> dict[str, Any]:
        """A block as it begins."""
        if block.kind is Kind.CALL:
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
        return {"type": "thinking", "thinking": ""} if block.kind is Kind.REASONING else {"type": "text", "text": ""}

    def _whole(self, piece: Piece) -> bytes:
        if piece.message is None:
            piece.text = "".join((*self._text, piece.text))
        for _ in self._blocks.additions(numbered(piece)):
            pass
        self._blocks.close()
        content = [self._block(block) for block in self._blocks.done]
        stop, sequence = self._stop(piece)
        rest = {
            "content": content or [{"type": "text", "text": ""}],  # clients look at the first one unasked
            "stop_reason": stop,
            "stop_sequence": sequence,
            "usage": self._usage(piece),
        }
        return self._render.head.encode() + _json(rest)[1:]

    def _block(self, block: Block) -> dict[str, Any]:
        """A block that is complete."""
        if block.kind is Kind.REASONING:
            return {"type": "thinking", "thinking": block.text, "signature": self._blocks.name(block, "sig")}
        if block.kind is Kind.TEXT:
            return {"type": "text", "text": block.text}
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": arguments(block.text)}

    def _stop(self, piece: Piece) -> tuple[str, str | None]:
        """`stop_reason` and `stop_sequence`: a call that a stop string has cut short must not be run."""
        calls = [block for block in self._blocks.done if block.kind is Kind.CALL]
        if piece.finish == "length":
            return "max_tokens", None
        if calls and is_json(calls[-1].text):
            return "tool_use", None
        if isinstance(piece.stop_reason, str):
            return "stop_sequence", piece.stop_reason
        return ("tool_use" if calls or piece.finish == "tool_calls" else "end_turn"), None

    def _usage(self, piece: Piece, tokens: int | None = None) -> dict[str, int]:
        cached = piece.cached_tokens if self._cached_tokens < 0 else self._cached_tokens
        cached = min(cached, self._prompt_tokens)
        return {
            "input_tokens": self._prompt_tokens - cached,
            "cache_read_input_tokens": cached,
            "output_tokens": self._tokens if tokens is None else tokens,
        }


def framed(events: bytes, render: Render) -> bytes:
    """Events as the connection wants them: as a chunk of HTTP, or bare."""
    return chunk(events) if render.chunked else events


def event(kind: str, members: dict[str, Any]) -> bytes:
    """A server-sent event that says its type twice, as both APIs want it."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json({"type": kind, **members}))


def numbered(piece: Piece) -> Piece:
    """The end of a unary answer, with its tool calls numbered as those of a stream are."""
    said = said_by(piece)
    for number, call in enumerate(said.get("tool_calls") or ()):
        call["index"] = number
    return Piece(piece.ids, piece.text, message=_json(said), members=b'"logprobs":%b' % _logprobs(piece))


def _logprobs(piece: Piece) -> bytes:
    return _json({"content": logprobs_of(piece)})


def _added(block: Block, text: str) -> dict[str, str]:
    if block.kind is Kind.REASONING:
        return {"type": "thinking_delta", "thinking": text}
    if block.kind is Kind.TEXT:
        return {"type": "text_delta", "text": text}
    return {"type": "input_json_delta", "partial_json": text}


def is_json(text: str) -> bool:
    """Whether a text is whole JSON."""
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return False
    return True


def arguments(text: str) -> dict[str, Any]:
    """The arguments of a call, which the model may have got wrong: then they are told as they are."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError:
        return {"arguments": text}
