"""What writes an answer in the API that the client speaks; see `wire.Shape`."""

from __future__ import annotations

from typing import Protocol

from workers.engine.base import Piece
from workers.engine.messages import Message
from workers.engine.render import Choice
from workers.engine.responses import Response
from workers.runtime.wire import Render, Shape


class Writer(Protocol):
    """Writes one answer; pieces come in order."""

    def delta(self, piece: Piece) -> bytes:
        """Bytes for the client after a step that is not the last; none for a unary answer."""
        ...

    def end(self, piece: Piece) -> bytes:
        """Bytes for the client at the end: the last events, or the whole of a unary answer."""
        ...


def writer(render: Render, prompt_tokens: int = 0, produced: int = 0, cached_tokens: int = -1) -> Writer:
    """The writer of an answer.

    Args:
        render: How it is written.
        prompt_tokens: Length of the client's prompt.
        produced: Tokens that another worker answered with before; the stream they belong to is open already.
        cached_tokens: Of the prompt, what a prefill worker found in its cache; -1 where the pieces tell.
    """
    if render.shape is Shape.MESSAGE:
        return Message(render, prompt_tokens, produced, cached_tokens)
    if render.shape is Shape.RESPONSE:
        return Response(render, prompt_tokens, produced, cached_tokens)
    return Choice(render, prompt_tokens, produced)
