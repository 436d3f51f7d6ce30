"""Requests for generated text: what their routes share, from token ids to the last byte.

Per stream the worker's bytes go straight to the connection. What only the frontend can know is written here: the envelope
of a unary answer of several choices, the usage of all of them together, `[DONE]`, and errors.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec

from launch.errors import only
from workers.engine.render import chunk
from workers.frontend import sources
from workers.frontend.errors import ApiError
from workers.frontend.exchange import Answered, Pool, Question, Relay, answer
from workers.frontend.http import Request
from workers.frontend.metrics import ModelMetrics
from workers.frontend.openai import ChatRequest, Common, CompletionRequest, options
from workers.frontend.reply import REQUEST_ID_HEADER, Reply, told
from workers.frontend.service import Service
from workers.frontend.trace import context_of
from workers.frontend.wishes import wishes
from workers.runtime.wire import Render, Shape

DONE = b"data: [DONE]\n\n"
DP_RANK_HEADER = "x-data-parallel-rank"
PREFIXES = {Shape.CHAT: "chatcmpl-", Shape.COMPLETION: "cmpl-", Shape.MESSAGE: "msg_", Shape.RESPONSE: "resp_"}
UNNAMEABLE = re.compile(r"[^A-Za-z0-9._-]")
# An error within a stream as bytes, in the manner of each API.
ErrorEvent = Callable[[ApiError], bytes]


class Generation:
    """One request for answers: every prompt gets `n` of them.

    Args:
        shape: The API.
        ask: What the frontend has read of the request, as a chat's or a completion's.
        fields: All of it, likewise.
        prompts: Packed token ids.
        echoes: For each prompt its text, where it may have to be said again and is known here.
        made_of: For each prompt that a worker makes what it makes it of (`workers.frontend.sources`).
    """

    def __init__(
        self,
        shape: Shape,
        ask: ChatRequest | CompletionRequest,
        fields: dict[str, Any],
        prompts: list[bytes],
        echoes: list[str | None],
        made_of: list[bytes] | None = None,
    ) -> None:
        self._sources = made_of or [b""] * len(prompts)
        self._guess = sources.guess(fields) if any(self._sources) else 0
        self._sketch = sources.sketch(fields) if self._guess else b""
        self._media = bool(self._guess) and shape is not Shape.COMPLETION and sources.has_media(fields["messages"])
        self.shape = shape
        self.ask: Common = ask
        self.prompts = prompts
        self.choices = ask.n or 1
        self._echoes = echoes
        self._fields = fields
        self._options = options(fields, chat=isinstance(ask, ChatRequest))
        self._logprobs = fields.get("logprobs") is not None and fields["logprobs"] is not False  # 0 asks for them too
        self.id = PREFIXES[shape] + secrets.token_hex(12)

    @property
    def tokens(self) -> int:
        """Prompt tokens that the workers compute, with each answer counted: none need share a worker."""
        return self.choices * sum(len(prompt) // 4 or self._guess for prompt in self.prompts)

    @property
    def param(self) -> str:
        """The field that holds the prompt."""
        chats = {Shape.COMPLETION: "prompt", Shape.RESPONSE: "input"}
        return chats.get(self.shape, "messages")

    def check(self, max_model_len: int) -> None:
        """Refuse what cannot fit the context.

        Raises:
            ApiError: 400, a prompt leaves no room for an answer.
        """
        wanted = self.ask.limit
        if wanted > max_model_len:
            raise ApiError(400, f"max_tokens={wanted} is more than the context of {max_model_len} tokens", "max_tokens")
        for prompt in self.prompts:
            tokens = len(prompt) // 4
            if tokens >= max_model_len:
                raise ApiError(
                    400,
                    f"this model's maximum context length is {max_model_len} tokens, but the prompt has {tokens} tokens "
                    "and leaves no room for an answer: shorten it",
                    param=self.param,
                )

    def envelope(self) -> str:
        """The beginning of every JSON object of an answer in choices, up to these."""
        kind = "text_completion"
        if self.shape is Shape.CHAT:
            kind = "chat.completion.chunk" if self.ask.stream else "chat.completion"
        quoted = msgspec.json.encode(self.ask.model).decode()
        return f'{{"id":"{self.id}","object":"{kind}","created":{int(time.time())},"model":{quoted},'

    def questions(self, head: str, request: Request, adapter: str) -> list[Question]:
        """What the workers are asked: each answer is a question of its own, on whichever worker."""
        ask = self.ask
        tail = ',"usage":null}' if ask.include_usage and not ask.continuous_usage else "}"
        dp_rank, trace = _dp_rank(request), context_of(request.headers)
        # Told from others of the same id by what is ours of it: an engine's abort means all that share an id.
        name = f"{UNNAMEABLE.sub('_', request.headers[REQUEST_ID_HEADER])[:64]}-{self.id}"
        found = []
        for number, prompt in enumerate(self.prompts):
            wanted = wishes(request.headers, self._fields)
            wanted.sketch = self._sketch
            for choice in range(self.choices):
                index = number * self.choices + choice
                render = Render(
                    shape=self.shape,
                    stream=ask.streams,
                    chunked=request.chunked,
                    head=head,
                    tail=tail,
                    index=index,
                    usage=ask.continuous_usage,
                    echo=self._echoes[number],
                )
                found.append(
                    Question(
                        request_id=f"{name}-{index}",
                        prompt=prompt,
                        source=self._sources[number],
                        guess=self._guess,
                        media=self._media,
                        render=render,
                        options=self._options,
                        max_tokens=ask.limit,
                        priority=ask.priority or 0,
                        adapter=adapter,
                        dp_rank=dp_rank,
                        choice=choice,
                        reads_prompt=ask.reads_prompt,
                        restarts=(self._logprobs or ask.reads_prompt) and not ask.streams,
                        trace=trace,
                        wishes=wanted,
                    )
                )
        return found


async def chat_of(
    service: Service, shape: Shape, ask: ChatRequest, fields: dict[str, Any], size: int, echo: str | None = None
) -> Generation:
    """A generation from a chat, whose model was admitted and which was checked; `size` is about how long it is, in bytes."""
    prompt, source = await service.conversation(ask, fields["messages"], size)
    return Generation(shape, ask, fields, [prompt], [echo], [source])


async def answer_choices(service: Service, generation: Generation, request: Request, reply: Reply) -> None:
    """Answer a chat or a completion, streamed or whole.

    Raises:
        ApiError: It was refused, or could not be answered, before its first byte.
    """
    generation.check(service.context())
    ask = generation.ask
    envelope = generation.envelope()
    header = told(request) + service.gate.charge(request.key_id, generation.tokens)
    answers = Streamed(reply, header, service.metrics) if ask.streams else Collected()
    questions = generation.questions(envelope, request, service.adapter(ask.model))
    ends = await _finished(service, generation, questions, answers, reply, request, openai_event)
    if ends is None:
        return
    usage = _counted(service.metrics, generation, ends)
    if isinstance(answers, Streamed):
        for end in ends:
            answers.write(end.data)
        tail = f'data: {envelope}"choices":[],"usage":{usage}}}\n\n' if ask.include_usage else ""
        answers.write(framed(tail.encode() + DONE, request.chunked))
        reply.end_events()
    else:
        choices = b",".join(end.data for end in ends)
        extra = ends[0].extra
        body = b'%b"choices":[%b],"usage":%b%b}' % (envelope.encode(), choices, usage.encode(), extra)
        reply.respond(200, body, header)


async def answer_whole(
    service: Service,
    generation: Generation,
    head: str,
    request: Request,
    reply: Reply,
    error_event: ErrorEvent,
    keep: Callable[[bytes], None] | None = None,
) -> None:
    """Answer what a worker renders to its last byte (`wire.Shape.whole`).

    Args:
        service: What it is answered from.
        generation: The request; its context was checked.
        head: The beginning of the answer's JSON object.
        request: As it came.
        reply: Where the answer goes.
        error_event: Writes an error that comes after the first byte.
        keep: Gets the whole answer before the client gets its end; awaited in a thread.

    Raises:
        ApiError: It was refused, or could not be answered, before its first byte.
    """
    header = told(request) + service.gate.charge(request.key_id, generation.tokens)
    answers = Streamed(reply, header, service.metrics) if generation.ask.streams else Collected()
    questions = generation.questions(head, request, service.adapter(generation.ask.model))
    ends = await _finished(service, generation, questions, answers, reply, request, error_event)
    if ends is None:
        return
    _counted(service.metrics, generation, ends)
    if keep is not None:
        await asyncio.to_thread(keep, ends[0].extra)
    if isinstance(answers, Streamed):
        answers.write(ends[0].data)
        reply.end_events()
    else:
        reply.respond(200, ends[0].data, header)


async def _finished(
    service: Service,
    generation: Generation,
    questions: list[Question],
    answers: Streamed | Collected,
    reply: Reply,
    request: Request,
    error_event: ErrorEvent,
) -> list[Answered] | None:
    """The ends of all answers, asked for once it is the request's turn; None when the stream has been ended with an error."""
    gate, key = service.gate, request.key_id
    await gate.turn(key, generation.tokens)
    relays = [Relay(answers.write) for _ in questions]
    ends: list[Answered] = []
    try:
        with gate.passing():
            ends = await _all_answers(service.pool, questions, relays)
    except ApiError as error:
        if not isinstance(answers, Streamed) or not answers.begun:
            raise
        # After the first byte an error is an event that ends the stream; its status is for the metrics.
        reply.status = error.status
        answers.write(framed(error_event(error), request.chunked))
        reply.end_events()
        return None
    finally:  # who leaves before the end has had the tokens until then
        told = sum(end.completion_tokens for end in ends) or sum(len(relay.ids) // 4 for relay in relays)
        gate.answered(key, told + max(0, sum(end.prompt_tokens for end in ends) - generation.tokens))
    return ends


async def _all_answers(pool: Pool, questions: list[Question], relays: list[Relay]) -> list[Answered]:
    """The answers in the order of the questions; the first failure cancels the rest."""
    pairs = list(zip(questions, relays, strict=True))
    if len(pairs) == 1:
        return [await answer(pool, *pairs[0])]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(pool, *pair)) for pair in pairs]
    except BaseExceptionGroup as errors:
        refused = only(errors, ApiError)
        if refused is None:
            raise
        raise refused from None
    return [task.result() for task in tasks]


def _counted(metrics: ModelMetrics, generation: Generation, ends: list[Answered]) -> str:
    """The usage of all choices together, counted: a prompt counts once, however many answers it got."""
    prompt = sum(end.prompt_tokens for end in ends[:: generation.choices])
    completion = sum(end.completion_tokens for end in ends)
    cached = sum(end.cached_tokens for end in ends[:: generation.choices])
    metrics.prompt_tokens.inc(prompt)
    metrics.completion_tokens.inc(completion)
    metrics.cached_tokens.inc(cached)
    told_of = [end.reasoning_tokens for end in ends if end.reasoning_tokens >= 0]
    reasoning = f',"completion_tokens_details":{{"reasoning_tokens":{sum(told_of)}}}' if told_of else ""
    return (
        f'{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{prompt + completion},'
        f'"prompt_tokens_details":{{"cached_tokens":{cached}}}{reasoning}}}'
    )


class Streamed:
    """The bytes of a stream: its head is sent with the first of them, so that an early error keeps its own status."""

    __slots__ = ("_asked", "_header", "_metrics", "_reply", "begun")

    def __init__(self, reply: Reply, header: bytes, metrics: ModelMetrics) -> None:
        self.begun = False
        self._reply = reply
        self._header = header
        self._metrics = metrics
        self._asked = time.perf_counter()

    def write(self, data: bytes) -> None:
        """Send bytes that are already framed."""
        if not self.begun:
            self.begun = True
            self._metrics.first_byte.observe(time.perf_counter() - self._asked)
            self._reply.begin_events(self._header)
            self._reply.write(data)
            self._reply.flush()  # the first token waits for nobody
            return
        self._reply.write(data)


class Collected:
    """A unary answer: nothing is sent before its end."""

    def write(self, data: bytes) -> None:
        """A worker has nothing to say before the end of a unary answer."""


def framed(payload: bytes, chunked: bool) -> bytes:
    """The payload as a chunk where the client's HTTP version knows chunks."""
    return chunk(payload) if chunked else payload


def openai_event(error: ApiError) -> bytes:
    """An error at the end of a chat's or a completion's stream."""
    return b"data: " + error.body() + b"\n\n" + DONE


def _dp_rank(request: Request) -> int:
    """The data-parallel rank that the client names, in vLLM's header; -1 for any.

    Raises:
        ApiError: 400, it is no number.
    """
    given = request.headers.get(DP_RANK_HEADER)
    if given is None:
        return -1
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise ApiError(400, f"{DP_RANK_HEADER} is a number from 0 on, got {given!r}")
    return int(given)
