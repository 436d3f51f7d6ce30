"""Render an answer as a response of OpenAI's responses API, unary or as its events.

Source of the formats: https://platform.openai.com/docs/api-reference/responses and /responses-streaming. As in vLLM 0.32,
an answer that was cut off ends with `response.completed` too, its status "incomplete": clients wait for that event.
"""

from __future__ import annotations

from typing import Any

import msgspec

from workers.engine.base import Piece
from workers.engine.blocks import Block, Blocks, Kind, logprobs_of
from workers.engine.messages import event, framed, numbered
from workers.runtime.wire import Render

_json = msgspec.json.Encoder().encode


class Response:
    """The writer of one response; `shapes.writer` says what the arguments mean.

    The last piece's `extra` is the response as a whole, for whoever keeps it.
    """

    def __init__(self, render: Render, prompt_tokens: int, produced: int, cached_tokens: int) -> None:
        self._render = render
        self._blocks = Blocks(render.head)
        self._begun = False
        self._opened_elsewhere = produced > 0
        self._number = 0
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
        opening = self._opening(piece)
        events = self._events(piece)
        return framed(opening + events, self._render) if opening + events else b""

    def end(self, piece: Piece) -> bytes:
        """Bytes for the client at the end: the last events, or the whole of a unary answer."""
        self._tokens += len(piece.ids)
        if not self._render.stream:
            return self._whole(piece)
        events = self._opening(piece) + self._events(piece, last=True)
        closed = self._blocks.close()
        events += self._closed(closed) if closed else b""
        response = self._response(piece)
        piece.extra = bytes(response)
        return framed(events + self._event("response.completed", {"response": response}), self._render)

    def _opening(self, piece: Piece) -> bytes:
        """The events before the first block. On another worker's stream they count, and so do that one's others, unheard:
        told token by token they are as many or more, so that numbers go on rising."""
        if self._begun:
            return b""
        self._begun = True
        begun = self._state({"status": "in_progress", "incomplete_details": None, "output": [], "usage": None})
        events = b"".join(
            self._event(kind, {"response": begun}) for kind in ("response.created", "response.in_progress")
        )
        for sent in piece.before:
            self._events(sent)
        return b"" if self._opened_elsewhere else events

    def _events(self, piece: Piece, last: bool = False) -> bytes:
        events, before = b"", self._blocks.open
        for block, added in self._blocks.additions(piece, last):
            if block is not before:
                events += self._closed(before) if before else b""
                events += self._begin(block)
                before = block
            if added:
                events += self._add(block, added, piece)
        return events

    def _begin(self, block: Block) -> bytes:
        events = self._event(
            "response.output_item.added",
            {"output_index": block.index, "item": self._item(block, "in_progress", begun=True)},
        )
        if block.kind is not Kind.CALL:
            events += self._event("response.content_part.added", {**self._at(block), "part": _part(block, begun=True)})
        return events

    def _add(self, block: Block, text: str, piece: Piece) -> bytes:
        if block.kind is Kind.CALL:
            return self._event("response.function_call_arguments.delta", {**self._at(block), "delta": text})
        if block.kind is Kind.REASONING:
            return self._event("response.reasoning_text.delta", {**self._at(block), "delta": text})
        new = {"delta": text, "logprobs": logprobs_of(piece)}
        return self._event("response.output_text.delta", {**self._at(block), **new})

    def _closed(self, block: Block) -> bytes:
        at = self._at(block)
        if block.kind is Kind.CALL:
            events = self._event(
                "response.function_call_arguments.done", {**at, "arguments": block.text, "name": block.name}
            )
        elif block.kind is Kind.REASONING:
            events = self._event("response.reasoning_text.done", {**at, "text": block.text})
        else:
            events = self._event("response.output_text.done", {**at, "text": block.text, "logprobs": []})
        if block.kind is not Kind.CALL:
            events += self._event("response.content_part.done", {**at, "part": _part(block)})
        done = {"output_index": block.index, "item": self._item(block, "completed")}
        return events + self._event("response.output_item.done", done)

    def _at(self, block: Block) -> dict[str, Any]:
        """Where a block is, for events about it."""
        where: dict[str, Any] = {"item_id": self._name(block), "output_index": block.index}
        return where if block.kind is Kind.CALL else {**where, "content_index": 0}

    def _name(self, block: Block) -> str:
        return self._blocks.name(block, {Kind.CALL: "fc", Kind.REASONING: "rs", Kind.TEXT: "msg"}[block.kind])

    def _item(self, block: Block, status: str, begun: bool = False) -> dict[str, Any]:
        common: dict[str, Any] = {"id": self._name(block), "status": status}
        if block.kind is Kind.CALL:
            call = {"call_id": block.call_id, "name": block.name, "arguments": "" if begun else block.text}
            return {"type": "function_call", **common, **call}
        content = [] if begun else [_part(block)]
        if block.kind is Kind.REASONING:
            if not self._render.stream:
                common["status"] = None  # as vLLM's server: only a stream's reasoning has one
            return {"type": "reasoning", **common, "summary": [], **({} if begun else {"content": content})}
        return {"type": "message", **common, "role": "assistant", "content": content}

    def _whole(self, piece: Piece) -> bytes:
        if piece.message is None:
            piece.text = "".join((*self._text, piece.text))
        for _ in self._blocks.additions(numbered(piece)):
            pass
        self._blocks.close()
        piece.extra = bytes(self._response(piece))
        return piece.extra

    def _response(self, piece: Piece) -> msgspec.Raw:
        cut = piece.finish == "length"
        cached = piece.cached_tokens if self._cached_tokens < 0 else self._cached_tokens
        usage = {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": min(cached, self._prompt_tokens), "cache_write_tokens": 0},
            "output_tokens": self._tokens,
            "output_tokens_details": {"reasoning_tokens": max(0, piece.reasoning_tokens), "tool_output_tokens": 0},
            "total_tokens": self._prompt_tokens + self._tokens,
        }
        status = {"status": "incomplete" if cut else "completed"}
        why = {"incomplete_details": {"reason": "max_output_tokens"} if cut else None}
        output = [self._item(block, "completed") for block in self._blocks.done]
        return self._state({**status, **why, "output": output, "usage": usage})

    def _state(self, rest: dict[str, Any]) -> msgspec.Raw:
        return msgspec.Raw(self._render.head.encode() + _json(rest)[1:])

    def _event(self, kind: str, members: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        return event(kind, {"sequence_number": number, **members})


def _part(block: Block, begun: bool = False) -> dict[str, Any]:
    text = "" if begun else block.text
    if block.kind is Kind.REASONING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [] if begun else block.logprobs or None}
