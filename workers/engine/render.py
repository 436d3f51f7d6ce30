"""Render an answer as the bytes that the client reads (OpenAI's chat completion and completion formats).

This is done by workers, whose cores are idle while the accelerator works; the frontend only passes the bytes on.
Source of the formats: https://platform.openai.com/docs/api-reference/chat/streaming and /completions.
"""

from __future__ import annotations

import msgspec

from workers.engine.base import NO_MEMBERS, Piece
from workers.runtime.wire import Render, Shape

_json = msgspec.json.Encoder().encode
NULL = b"null"


class Choice:
    """The renderer of one choice; keeps what a unary answer needs until its end.

    Args:
        render: How the answer is written.
        prompt_tokens: Length of the client's prompt, for events that count.
        produced: Tokens that another worker answered with before; the stream they belong to is open already.
    """

    def __init__(self, render: Render, prompt_tokens: int = 0, produced: int = 0) -> None:
        self._chat = render.shape is Shape.CHAT
        self._render = render
        self._head = b"data: " + render.head.encode() + b'"choices":[{"index":%d,' % render.index
        self._tail = render.tail.encode() + b"\n\n"
        self._text: list[str] = []
        self._opened = bool(produced) or not self._chat
        # What stands around the text of a plain delta, which is what nearly all are, is made once and not for each token:
        # what comes before it once for each length of text, as an HTTP chunk begins with its size.
        before, after = (b'"delta":{"content":', b"}") if self._chat else (b'"text":', b"")
        self._before = self._head + before
        self._after = b'%b,%b,"finish_reason":null}]%b' % (after, NO_MEMBERS, self._tail)
        self._around = len(self._before) + len(self._after)
        self._ending = self._after + b"\r\n" * render.chunked
        self._leads: dict[int, bytes] = {}
        self._plain = render.stream and self._opened and not render.usage
        self._prompt_tokens = prompt_tokens
        self._tokens = produced

    def delta(self, piece: Piece) -> bytes:
        """Bytes for the client after a step that is not the last; none for a unary answer."""
        if self._plain and piece.text and piece.message is None and piece.members == NO_MEMBERS:
            text = _json(piece.text)
            lead = self._leads.get(len(text))
            return b"".join((self._lead(len(text)) if lead is None else lead, text, self._ending))
        if not self._render.stream:
            self._text.append(piece.text)
            return b""
        silent = not piece.message if piece.message is not None else not piece.text and piece.members == NO_MEMBERS
        opening = b"" if silent else self._opening(piece.extra)
        self._tokens += len(piece.ids)
        return b"" if silent else opening + self._event(self._content(piece), piece.members, NULL, NULL)

    def end(self, piece: Piece) -> bytes:
        """Bytes for the client at the end: the last event, or the whole choice of a unary answer."""
        reason, stop = _json(piece.finish), _json(piece.stop_reason)
        if self._render.stream:
            opening = self._opening(piece.extra)
            self._tokens += len(piece.ids)
            return opening + self._event(self._content(piece), piece.members, reason, stop)
        whole = _json("".join((*self._text, piece.text)))
        if not self._chat:
            body = b'"text":' + whole
        else:
            body = b'"message":' + (piece.message or b'{"role":"assistant","content":%b}' % whole)
        return b'{"index":%d,%b,%b,"finish_reason":%b,"stop_reason":%b}' % (
            self._render.index,
            body,
            piece.members,
            reason,
            stop,
        )

    def _lead(self, length: int) -> bytes:
        """What comes before a text of that length in a plain delta."""
        lead = b"%x\r\n%b" % (self._around + length, self._before) if self._render.chunked else self._before
        self._leads[length] = lead
        return lead

    def _opening(self, extra: bytes) -> bytes:
        """The event that opens a chat stream, once; with `extra` at its top."""
        if self._opened:
            return b""
        self._opened = True
        self._plain = not self._render.usage  # no event counts tokens: `_tokens` may then fall behind
        return self._event(b'"delta":{"role":"assistant","content":""}', NO_MEMBERS, NULL, None, extra)

    def _content(self, piece: Piece) -> bytes:
        if not self._chat:
            return b'"text":' + _json(piece.text)
        if piece.message is not None:
            return b'"delta":' + (piece.message or b"{}")
        return b'"delta":{"content":%b}' % _json(piece.text) if piece.text else b'"delta":{}'

    def _event(self, body: bytes, members: bytes, reason: bytes, stop: bytes | None, extra: bytes = b"") -> bytes:
        more = members + b',"finish_reason":' + reason
        if stop is not None and stop != NULL:
            more += b',"stop_reason":' + stop
        tail = self._tail
        if self._render.usage:
            counts = (self._prompt_tokens, self._tokens, self._prompt_tokens + self._tokens)
            tail = b',"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}\n\n' % counts
        event = self._head + body + b"," + more + b"}]" + extra + tail
        return chunk(event) if self._render.chunked else event


def chunk(payload: bytes) -> bytes:
    """One chunk of HTTP/1.1's chunked transfer coding (RFC 9112 §7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)
