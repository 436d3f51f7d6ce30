"""Render an answer as the bytes that the client reads (OpenAI's chat completion and completion formats).

This is done by workers, whose cores are idle while the accelerator works; the frontend only passes the bytes on.
Source of the formats: https://platform.openai.com/docs/api-reference/chat/streaming and /completions.
"""

from __future__ import annotations

import msgspec

from workers.runtime.wire import Render, Shape

_json = msgspec.json.Encoder().encode
NULL = b"null"


class Choice:
    """The renderer of one choice; keeps what a unary answer needs until its end."""

    def __init__(self, render: Render, resumed: bool = False) -> None:
        self._chat = render.shape is Shape.CHAT
        self._render = render
        self._head = b"data: " + render.head.encode() + b'"choices":[{"index":%d,' % render.index
        self._tail = b"}]" + render.tail.encode() + b"\n\n"
        self._text: list[str] = []
        self._opened = resumed or not self._chat

    def delta(self, text: str) -> bytes:
        """Bytes for the client after a step that is not the last; none for a unary answer."""
        if not self._render.stream:
            self._text.append(text)
            return b""
        if not text:
            return b""
        return self._opening() + self._event(self._content(text), NULL, NULL)

    def end(self, text: str, finish: str, stop_reason: int | str | None) -> bytes:
        """Bytes for the client at the end: the last event, or the whole choice of a unary answer."""
        reason, stop = _json(finish), _json(stop_reason)
        if self._render.stream:
            return self._opening() + self._event(self._content(text), reason, stop)
        whole = _json("".join((*self._text, text)))
        body = b'"message":{"role":"assistant","content":%b}' % whole if self._chat else b'"text":%b' % whole
        return b'{"index":%d,%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b}' % (
            self._render.index,
            body,
            reason,
            stop,
        )

    def _opening(self) -> bytes:
        """The event that opens a chat stream, once."""
        if self._opened:
            return b""
        self._opened = True
        return self._event(b'"delta":{"role":"assistant","content":""}', NULL, None)

    def _content(self, text: str) -> bytes:
        if not self._chat:
            return b'"text":' + _json(text)
        return b'"delta":{"content":%b}' % _json(text) if text else b'"delta":{}'

    def _event(self, body: bytes, reason: bytes, stop: bytes | None) -> bytes:
        more = b'"logprobs":null,"finish_reason":' + reason
        if stop is not None and stop != NULL:
            more += b',"stop_reason":' + stop
        event = self._head + body + b"," + more + self._tail
        return chunk(event) if self._render.chunked else event


def chunk(payload: bytes) -> bytes:
    """One chunk of HTTP/1.1's chunked transfer coding (RFC 9112 §7.1)."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)
