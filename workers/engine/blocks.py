"""What messages and responses are made of: an answer is a row of blocks (reasoning, text, tool calls), one open at a time.

A piece says what a step added to an answer as a chat's delta; here it becomes what it adds to which block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from workers.engine.base import NO_MEMBERS, Piece

MADE_UP = ("call_", "chatcmpl-tool-")


class Kind(StrEnum):
    """What a block holds."""

    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(slots=True)
class Block:
    """`text` is its text so far, of a call its arguments. `call` is the number of the call among those of the answer."""

    kind: Kind
    index: int
    text: str = ""
    call: int = -1
    call_id: str = ""
    name: str = ""
    logprobs: list[Any] = field(default_factory=list)


class Blocks:
    """The blocks of one answer, from its pieces.

    Names of blocks and calls follow from the answer's own name, so that a worker that goes on with an answer gives them the
    names that the client has.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.done: list[Block] = []
        self.open: Block | None = None
        self._held = ""

    def name(self, block: Block, prefix: str) -> str:
        """A name for a block that no other answer has."""
        return f"{prefix}_{hashlib.blake2s(f'{self._name}/{block.index}'.encode(), digest_size=16).hexdigest()}"

    def additions(self, piece: Piece, last: bool = False) -> Iterator[tuple[Block, str]]:
        """Blocks and what is added to each, in order; with `last` also what was held back.

        Text within a tool call (white space between two, mostly) is held until the call has ended: its arguments may go on.
        """
        said = said_by(piece)
        if said.get("reasoning"):
            yield self._add(Kind.REASONING, said["reasoning"])
        if said.get("content") and self.open is not None and self.open.kind is Kind.CALL:
            self._held += said["content"]
        elif said.get("content"):
            block, text = self._add(Kind.TEXT, said["content"])
            block.logprobs += logprobs_of(piece)
            yield block, text
        for call in said.get("tool_calls") or ():
            function = call.get("function") or {}
            number = call.get("index", -1 if self.open is None else self.open.call)
            if self.open is None or self.open.kind is not Kind.CALL or self.open.call != number:
                if not function.get("name"):
                    continue  # the rest of a call that another block has ended
                yield from self._let_go()
                self._begin(Kind.CALL, number, self._call_id(call.get("id"), number), function["name"])
            assert self.open
            self.open.text += function.get("arguments") or ""
            yield self.open, function.get("arguments") or ""
        if last:
            yield from self._let_go()

    def close(self) -> Block | None:
        """End the open block, if there is one."""
        closed, self.open = self.open, None
        if closed:
            self.done.append(closed)
        return closed

    def _let_go(self) -> Iterator[tuple[Block, str]]:
        held, self._held = self._held, ""
        if held:
            yield self._add(Kind.TEXT, held)

    def _add(self, kind: Kind, text: str) -> tuple[Block, str]:
        if self.open is None or self.open.kind is not kind:
            self._begin(kind)
        assert self.open
        self.open.text += text
        return self.open, text

    def _begin(self, kind: Kind, call: int = -1, call_id: str = "", name: str = "") -> None:
        self.close()
        self.open = Block(kind, len(self.done), call=call, call_id=call_id, name=name)

    def _call_id(self, given: str | None, number: int) -> str:
        """The id of a tool call; models that number their calls do so again the same, parsers make theirs up."""
        if given and not given.startswith(MADE_UP):
            return given
        return f"call_{hashlib.blake2s(f'{self._name}/call/{number}'.encode(), digest_size=12).hexdigest()}"


def said_by(piece: Piece) -> dict[str, Any]:
    """What a piece says, as a chat's delta (or, at the end of a unary answer, its message)."""
    if piece.message is None:
        return {"content": piece.text}
    return msgspec.json.decode(piece.message, type=dict[str, Any]) if piece.message else {}


def logprobs_of(piece: Piece) -> list[Any]:
    """The logprobs of a piece's tokens, in a chat's form."""
    if piece.members == NO_MEMBERS:
        return []
    members = msgspec.json.decode(b"{%b}" % piece.members, type=dict[str, Any])
    found: list[Any] = (members.get("logprobs") or {}).get("content") or []
    return found
