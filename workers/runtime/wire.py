"""The request plane's messages: msgpack arrays over ZMQ, typed by msgspec.

A worker binds a ROUTER socket; each frontend connects one DEALER to it. A frontend names its streams with numbers of its
own. Each engine step a worker sends at most *one* `Step` to each frontend with whatever its streams have produced: new
token ids, and the finished bytes for the client, which the frontend passes on unread.

Token ids travel as packed little-endian 32-bit numbers, so that keeping them (for a later continuation elsewhere) is an
append of bytes.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec


class Leg(StrEnum):
    """Which part of a request a worker is asked for."""

    WHOLE = "whole"
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


class Shape(StrEnum):
    """Which API's answers the worker renders.

    Of chats and completions it renders the choices, several of which make an answer. A message (Anthropic's API) and a
    response (OpenAI's newer API) have but one, and are rendered to their last byte.
    """

    CHAT = "chat"
    COMPLETION = "completion"
    MESSAGE = "message"
    RESPONSE = "response"

    @property
    def whole(self) -> bool:
        """Whether the worker renders all of the answer, its usage too."""
        return self is Shape.MESSAGE or self is Shape.RESPONSE


class Render(msgspec.Struct, array_like=True):
    """How a worker writes the answer.

    With `stream`, every delta becomes one server-sent event `data: {<head>,"choices":[...]<tail>`, framed as an HTTP/1.1
    chunk when `chunked`; with `usage` each event counts the tokens so far, between its choices and the tail. Without
    `stream`, the End carries one finished JSON object of the `choices` list. `echo` opens the answer.

    Of a whole answer `head` opens its JSON object (an id, the model, what the request said), and `tail` is not used.
    """

    shape: Shape
    stream: bool
    chunked: bool
    head: str
    tail: str
    index: int
    usage: bool = False
    echo: str | None = None


NOTHING = Render(Shape.COMPLETION, False, False, "", "", 0)
"""For what no client reads."""


class Generate(msgspec.Struct, array_like=True, tag="g"):
    """Ask a worker for a leg of a request.

    `options` is a JSON object: what the client asked for, under the names of its API, less what the frontend itself has
    dealt with. The worker reads it with vLLM's own request classes. `max_tokens` -1 stands for as many as fit. `choice` is
    the number of the answer among those to one prompt: a seed is shifted by it. `cached_tokens` is what the prefill found
    in its prefix cache, -1 where this worker computes the prompt itself. `trace` are W3C trace context headers.

    `produced` are ids that another worker already answered with: they belong to the prompt of the engine, but neither to
    the prompt of the client nor to what is rendered again. `transfer` is what the prefill worker returned, unread; it is
    not used after `expires_at`, in seconds since the epoch by the prefill worker's clock.

    `source` is what the worker makes the prompt of itself, a JSON object with the client's `messages` or `prompt`; `prompt`
    is empty then. The worker of the first leg makes it, and later legs get its ids, with the media in them as `features`.
    """

    stream: int
    leg: Leg
    request_id: str
    prompt: bytes
    produced: bytes
    options: bytes
    max_tokens: int
    render: Render
    transfer: bytes = b""
    expires_at: float = 0.0
    priority: int = 0
    adapter: str = ""
    dp_rank: int = -1
    choice: int = 0
    cached_tokens: int = -1
    trace: dict[str, str] | None = None
    source: bytes = b""
    features: bytes = b""


class Call(msgspec.Struct, array_like=True, tag="f"):
    """Ask a worker for what is answered whole (embeddings, scores): the client's body, for one of vLLM's own routes."""

    stream: int
    request_id: str
    route: str
    body: bytes


class Cancel(msgspec.Struct, array_like=True, tag="c"):
    """Nobody waits for this stream any more."""

    stream: int


class Release(msgspec.Struct, array_like=True, tag="r"):
    """To a decode worker: free the blocks that a prefill worker holds for a decode that will not come."""

    request_id: str
    transfer: bytes


class Ping(msgspec.Struct, array_like=True, tag="p"):
    """A frontend is there; a worker answers with a Beat at its own pace."""


class End(msgspec.Struct, array_like=True):
    """The last word on a stream that was served.

    `extra` are JSON members for the top of a unary answer, each led by a comma. `reasoning_tokens` is -1 where nothing
    tells reasoning from the rest.
    """

    stream: int
    reason: str
    ids: bytes
    data: bytes
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = -1
    extra: bytes = b""


class Prefilled(msgspec.Struct, array_like=True):
    """The answer to a prefill leg: single use, and dead after `expires_at` (seconds since the epoch, worker's clock).

    `prompt` and `features` are what the worker made of the request's `source`, for the next leg. An encode leg is answered
    so too: with these, and nothing to transfer.
    """

    stream: int
    transfer: bytes
    expires_at: float
    prompt_tokens: int
    cached_tokens: int
    prompt: bytes = b""
    features: bytes = b""


class Called(msgspec.Struct, array_like=True):
    """The answer to a Call: the body for the client, whatever its status."""

    stream: int
    status: int
    body: bytes
    content_type: str
    prompt_tokens: int


class Failed(msgspec.Struct, array_like=True):
    """The last word on a stream that could not be served; `retryable` if another worker might do it.

    `source_lost` says that a decode worker could not reach the prefill worker that it was to pull from.
    """

    stream: int
    status: int
    message: str
    retryable: bool
    param: str | None = None
    source_lost: bool = False


class Delta(msgspec.Struct, array_like=True, gc=False):
    """What a stream has produced since its last frame: token ids, and bytes for the client."""

    stream: int
    ids: bytes
    data: bytes


class Step(msgspec.Struct, array_like=True, tag="s"):
    """What the streams of one frontend produced in one engine step, or in several that came fast: one delta for each."""

    deltas: list[Delta] = []
    ends: list[End] = []
    prefilled: list[Prefilled] = []
    failed: list[Failed] = []
    called: list[Called] = []


class Beat(msgspec.Struct, array_like=True, tag="b"):
    """A worker lives. `progress` grows whenever its engine did something; `serving` is False once it drains.

    `session` is new whenever the worker has forgotten the frontend, and its streams with it.
    """

    instance: str
    session: int
    serving: bool
    progress: int


LastWord = End | Prefilled | Failed | Called
ToWorker = Generate | Call | Cancel | Release | Ping
ToFrontend = Step | Beat

encode = msgspec.msgpack.Encoder().encode
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_frontend: msgspec.msgpack.Decoder[ToFrontend] = msgspec.msgpack.Decoder(ToFrontend)


def decode_to_worker(payload: bytes) -> ToWorker:
    """A message for a worker.

    Raises:
        msgspec.DecodeError: It is none.
    """
    try:
        return _to_worker.decode(payload)
    except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these through; neither is a DecodeError
        raise msgspec.DecodeError(str(error)) from error


def decode_to_frontend(payload: bytes) -> ToFrontend:
    """A message for a frontend.

    Raises:
        msgspec.DecodeError: It is none.
    """
    try:
        return _to_frontend.decode(payload)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


def pack(ids: Iterable[int]) -> bytes:
    """Token ids as packed little-endian 32-bit numbers."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def pack_few(ids: Sequence[int]) -> bytes:
    """`pack` for what an engine step adds to a stream: mostly one token, for which this is five times as fast."""
    return ids[0].to_bytes(4, "little") if len(ids) == 1 else pack(ids)


def unpack(packed: bytes) -> list[int]:
    """The inverse of `pack`."""
    ids = array("I")
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()
