"""The routes: authenticate, validate, tokenize, have the questions answered, and write the answer.

Per stream the worker's bytes go straight to the connection. What only the frontend can know is written here: the
envelope of a unary answer, the usage of all choices together, `[DONE]`, and errors.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from launch.recipe import Kind, Tokenize
from workers.engine.render import chunk
from workers.frontend import sources
from workers.frontend.admin import Admin
from workers.frontend.errors import ApiError
from workers.frontend.exchange import Answered, Pool, Question, answer, call
from workers.frontend.http import Connection, Request
from workers.frontend.metrics import Metrics
from workers.frontend.openai import ChatRequest, Common, CompletionRequest, options, parse
from workers.frontend.sources import has_media
from workers.frontend.text import Text
from workers.runtime.wire import Render, Shape, pack

DONE = b"data: [DONE]\n\n"
TOKENIZE_IN_THREAD_CHARS = 4096
MAX_ID = 2**31 - 1  # what travels; the engine knows its vocabulary
REQUEST_ID_HEADER = "x-request-id"
DP_RANK_HEADER = "x-data-parallel-rank"
# vLLM's routes for pooling models, and the same under /v1 where vLLM has them elsewhere.
POOLING_ROUTES = {
    "/v1/embeddings": "embeddings",
    **dict.fromkeys(("/classify", "/v1/classify"), "classify"),
    **dict.fromkeys(("/pooling", "/v1/pooling"), "pooling"),
    **dict.fromkeys(("/score", "/v1/score"), "score"),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), "rerank"),
}
OPEN_ROUTES = ("/health", "/live", "/metrics")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The model of the deployment."""

    name: str
    max_model_len: Callable[[], int]
    """Context length, as the workers say; 0 while none is there."""
    adapters: Callable[[], list[str]]
    """LoRA adapters that are loaded somewhere, each served as a model of its own."""
    created: int


class App:
    """The handler of all requests."""

    def __init__(
        self,
        served: Served,
        text: Text | None,
        pool: Pool,
        metrics: Metrics,
        api_key: str,
        tokenize: Tokenize = Tokenize.AUTO,
    ) -> None:
        """Make the handler; without a `text` workers make every prompt, else those that `tokenize` leaves to them."""
        self._served = served
        self._text = text
        self._tokenize_where = tokenize
        self._pool = pool
        self._metrics = metrics
        self._authorization = f"Bearer {api_key}".encode()
        self.draining = False
        self.admin: Admin | None = None
        self._routes: dict[tuple[str, str], Callable[[Request, Connection], Awaitable[None]]] = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completion,
            ("GET", "/v1/models"): self._models,
            ("GET", "/health"): self._health,
            ("GET", "/live"): self._live,
            ("HEAD", "/live"): self._live,
            ("HEAD", "/health"): self._health,
            ("GET", "/metrics"): self._metrics_page,
            **{("POST", path): self._pooling for path in POOLING_ROUTES},
        }
        self._methods = {path: method for method, path in reversed(self._routes)}

    async def __call__(self, request: Request, connection: Connection) -> None:
        """Answer one request."""
        path = request.path
        status = 500
        self._metrics.active.inc()
        try:
            await self._route(request)(request, connection)
            status = connection.status
        except ApiError as error:
            status = error.status
            connection.respond(status, error.body(), error.headers())
        except asyncio.CancelledError:
            status = 499  # the client closed the connection; nobody reads this status but the metrics
            self._metrics.disconnected.inc()
            raise
        finally:
            self._metrics.active.dec()
            self._metrics.requests.labels(path if path in self._methods else "other", str(status)).inc()

    def _route(self, request: Request) -> Callable[[Request, Connection], Awaitable[None]]:
        if self.admin is not None and self.admin.owns(request.path):
            return self.admin
        handler = self._routes.get((request.method, request.path))
        if handler is None:
            if request.path in self._methods:
                raise ApiError(405, f"{request.path} takes {self._methods[request.path]}, not {request.method}")
            raise ApiError(404, f"there is no route {request.path}")
        if request.path not in OPEN_ROUTES:
            self._authenticate(request)
        return handler

    def _authenticate(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), self._authorization):
            raise ApiError(401, "the API key is missing or wrong: send it as `Authorization: Bearer <key>`")

    # --- generation -----------------------------------------------------------------------------------------------

    async def _chat(self, request: Request, connection: Connection) -> None:
        ask, fields = parse(request.body, ChatRequest)
        self._admit(ask.model, generates=True)
        ask.check(fields)

        prompt, source = await self._conversation(ask, len(request.body))
        last = ask.messages[-1]
        spoken = last.get("content") if ask.echo and last.get("role") == "assistant" else None
        echo = spoken if isinstance(spoken, str) else None
        await self._generate(Generation(Shape.CHAT, ask, fields, [prompt], [echo], [source]), request, connection)

    async def _conversation(self, ask: ChatRequest, size: int) -> tuple[bytes, bytes]:
        """The packed ids of a conversation of about `size` bytes, or what a worker makes them of; the other is empty."""
        text = self._text
        if not ask.messages:
            raise ApiError(400, "messages must not be empty", param="messages")
        if text is None or (self._tokenize_where is Tokenize.AUTO and has_media(ask.messages)):
            return b"", sources.source(messages=ask.messages)
        prompt = await self._tokenize(
            size,
            lambda: text.chat(
                ask.messages,
                ask.template_variables,
                ask.tools,
                ask.continue_final_message,
                bool(ask.add_special_tokens),
            ),
        )
        return prompt, b""

    async def _completion(self, request: Request, connection: Connection) -> None:
        ask, fields = parse(request.body, CompletionRequest)
        self._admit(ask.model, generates=True)
        ask.check(fields)
        texts = ask.prompts()
        special = ask.add_special_tokens is not False
        prompts = [await self._prompt(prompt, special) for prompt in texts]
        echoes = [text if isinstance(text, str) else None for text in texts]
        by_worker = self._text is None
        made = [sources.source(prompt=text) if by_worker and isinstance(text, str) else b"" for text in texts]
        await self._generate(Generation(Shape.COMPLETION, ask, fields, prompts, echoes, made), request, connection)

    async def _pooling(self, request: Request, connection: Connection) -> None:
        """Embeddings and the like: the body goes to a worker as it came."""
        model = parse(request.body, Model)[0].model
        self._admit(model or self._served.name, generates=False)
        request_id = request.headers.get(REQUEST_ID_HEADER) or secrets.token_hex(16)
        adapter = self._adapter(model or self._served.name)
        route = POOLING_ROUTES[request.path]
        called = await call(self._pool, Kind.EMBEDDING, request_id, route, request.body, adapter)
        self._metrics.prompt_tokens.inc(called.prompt_tokens)
        connection.respond(called.status, called.body, _id_header(request_id), called.content_type.encode())

    async def _prompt(self, prompt: str | list[int], special: bool) -> bytes:
        """The packed ids of a prompt; none where a worker makes them."""
        text = self._text
        if text is None:
            return _packed(prompt, MAX_ID) if isinstance(prompt, list) else b""
        if isinstance(prompt, str):
            return await self._tokenize(len(prompt), lambda: text.encode(prompt, special))
        return _packed(prompt, text.vocabulary - 1)

    async def _tokenize(self, size: int, work: Callable[[], bytes]) -> bytes:
        """Long texts are tokenized in a thread: the tokenizer lets go of the GIL, and other streams go on."""
        return work() if size < TOKENIZE_IN_THREAD_CHARS else await asyncio.to_thread(work)

    def _admit(self, model: str, generates: bool) -> None:
        if model != self._served.name and model not in (adapters := self._served.adapters()):
            serves = ", ".join(map(repr, (self._served.name, *adapters)))
            raise ApiError(404, f"the model {model!r} does not exist; this deployment serves {serves}", "model")
        if generates is self._pool.pooling:
            can = "computes embeddings and scores" if self._pool.pooling else "generates text"
            raise ApiError(400, f"the model {model!r} {can} and cannot answer this", "model")
        if self.draining:
            raise ApiError(503, "the deployment is stopping", retry_after_s=5)
        if self._pool.unable:
            raise ApiError(503, self._reason(self._pool.unable), retry_after_s=1)

    def _adapter(self, model: str) -> str:
        return "" if model == self._served.name else model

    async def _generate(self, generation: Generation, request: Request, connection: Connection) -> None:
        context = self._served.max_model_len()
        if not context:
            raise ApiError(503, self._reason(self._pool.missing), retry_after_s=1)
        generation.check(context)
        ask = generation.ask
        request_id = request.headers.get(REQUEST_ID_HEADER) or secrets.token_hex(16)
        header = _id_header(request_id)
        envelope = generation.envelope(ask.model)
        answers = Streamed(connection, header, self._metrics) if ask.streams else Collected()
        chunked = request.chunked
        questions = generation.questions(envelope, chunked, self._adapter(ask.model), _dp_rank(request))
        try:
            ends = await self._all_answers(questions, answers)
        except ApiError as error:
            if not isinstance(answers, Streamed) or not answers.begun:
                raise
            # After the first byte an error is an event that ends the stream; its status is for the metrics.
            connection.status = error.status
            answers.write(framed(b"data: " + error.body() + b"\n\n" + DONE, chunked))
            connection.end_events()
            return
        usage = self._count(generation, ends)
        if isinstance(answers, Streamed):
            for end in ends:
                answers.write(end.data)
            tail = f'data: {envelope}"choices":[],"usage":{usage}}}\n\n' if ask.include_usage else ""
            answers.write(framed(tail.encode() + DONE, chunked))
            connection.end_events()
        else:
            choices = b",".join(end.data for end in ends)
            extra = ends[0].extra
            body = b'%b"choices":[%b],"usage":%b%b}' % (envelope.encode(), choices, usage.encode(), extra)
            connection.respond(200, body, header)

    async def _all_answers(self, questions: list[Question], answers: Streamed | Collected) -> list[Answered]:
        """The answers in the order of the questions; the first failure cancels the rest."""
        if len(questions) == 1:
            return [await answer(self._pool, questions[0], answers.write)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(self._pool, item, answers.write)) for item in questions]
        except* ApiError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    def _count(self, generation: Generation, ends: list[Answered]) -> str:
        """The usage of all choices together: a prompt counts once, however many answers it got."""
        prompt = sum(end.prompt_tokens for end in ends[:: generation.choices])
        completion = sum(end.completion_tokens for end in ends)
        cached = sum(end.cached_tokens for end in ends[:: generation.choices])
        self._metrics.prompt_tokens.inc(prompt)
        self._metrics.completion_tokens.inc(completion)
        self._metrics.cached_tokens.inc(cached)
        told = [end.reasoning_tokens for end in ends if end.reasoning_tokens >= 0]
        reasoning = f',"completion_tokens_details":{{"reasoning_tokens":{sum(told)}}}' if told else ""
        return (
            f'{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{prompt + completion},'
            f'"prompt_tokens_details":{{"cached_tokens":{cached}}}{reasoning}}}'
        )

    # --- the rest -------------------------------------------------------------------------------------------------

    async def _models(self, request: Request, connection: Connection) -> None:
        served = self._served
        common = {
            "object": "model",
            "created": served.created,
            "owned_by": "baton",
            "max_model_len": served.max_model_len(),
        }
        models: list[dict[str, Any]] = [{"id": served.name, **common}]
        models += [{"id": name, **common, "parent": served.name} for name in served.adapters()]
        connection.respond(200, msgspec.json.encode({"object": "list", "data": [] if self._pool.unable else models}))

    async def _health(self, request: Request, connection: Connection) -> None:
        missing = self._pool.missing
        if self.draining or self._pool.unable:
            connection.respond(503, msgspec.json.encode({"status": "unavailable", "reason": self._reason(missing)}))
        elif missing:
            connection.respond(200, msgspec.json.encode({"status": "degraded", "reason": self._reason(missing)}))
        else:
            connection.respond(200, b'{"status":"ready"}')

    async def _live(self, request: Request, connection: Connection) -> None:
        connection.respond(200, b'{"status":"alive"}')

    async def _metrics_page(self, request: Request, connection: Connection) -> None:
        connection.respond(200, self._metrics.page(), content_type=b"text/plain; version=0.0.4; charset=utf-8")

    def _reason(self, missing: list[Kind]) -> str:
        if self.draining:
            return "the deployment is stopping"
        return f"no {' and no '.join(missing)} worker is ready"


class Model(msgspec.Struct):
    """What the frontend reads of a request to a pooling model; it may leave out the name of the only one."""

    model: str | None = None


class Generation:
    """One request for answers: every prompt gets `n` of them.

    Args:
        shape: The API.
        ask: What the frontend has read of the request.
        fields: All of it.
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
        self._media = bool(self._guess) and shape is Shape.CHAT and has_media(fields["messages"])
        self.shape = shape
        self.ask: Common = ask
        self.prompts = prompts
        self.choices = ask.n or 1
        self._echoes = echoes
        self._options = options(fields)
        self._logprobs = fields.get("logprobs") is not None and fields["logprobs"] is not False  # 0 asks for them too
        self._id = f"{'chatcmpl' if shape is Shape.CHAT else 'cmpl'}-{secrets.token_hex(12)}"

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
                    param="messages" if self.shape is Shape.CHAT else "prompt",
                )

    def envelope(self, model: str) -> str:
        """The beginning of every JSON object of the answer, up to its choices."""
        kind = "text_completion"
        if self.shape is Shape.CHAT:
            kind = "chat.completion.chunk" if self.ask.stream else "chat.completion"
        quoted = msgspec.json.encode(model).decode()
        return f'{{"id":"{self._id}","object":"{kind}","created":{int(time.time())},"model":{quoted},'

    def questions(self, envelope: str, chunked: bool, adapter: str, dp_rank: int) -> list[Question]:
        """What the workers are asked: each answer is a question of its own, on whichever worker."""
        ask = self.ask
        tail = ',"usage":null}' if ask.include_usage and not ask.continuous_usage else "}"
        found = []
        for number, prompt in enumerate(self.prompts):
            for choice in range(self.choices):
                index = number * self.choices + choice
                render = Render(
                    shape=self.shape,
                    stream=ask.streams,
                    chunked=chunked,
                    head=envelope,
                    tail=tail,
                    index=index,
                    usage=ask.continuous_usage,
                    echo=self._echoes[number],
                )
                found.append(
                    Question(
                        request_id=f"{self._id}-{index}",
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
                    )
                )
        return found


def _packed(ids: list[int], largest: int) -> bytes:
    if any(not 0 <= token <= largest for token in ids):
        raise ApiError(400, f"prompt has token ids outside 0 to {largest}", param="prompt")
    return pack(ids)


class Streamed:
    """The bytes of a stream: its head is sent with the first of them, so that an early error keeps its own status."""

    def __init__(self, connection: Connection, header: bytes, metrics: Metrics) -> None:
        self.begun = False
        self._connection = connection
        self._header = header
        self._metrics = metrics
        self._asked = time.perf_counter()

    def write(self, data: bytes) -> None:
        """Send bytes that are already framed."""
        if not self.begun:
            self.begun = True
            self._metrics.first_byte.observe(time.perf_counter() - self._asked)
            self._connection.begin_events(self._header)
        self._connection.write(data)


class Collected:
    """A unary answer: nothing is sent before its end."""

    def write(self, data: bytes) -> None:
        """A worker has nothing to say before the end of a unary answer."""


def framed(payload: bytes, chunked: bool) -> bytes:
    """The payload as a chunk where the client's HTTP version knows chunks."""
    return chunk(payload) if chunked else payload


def _id_header(request_id: str) -> bytes:
    return b"x-request-id: %b\r\n" % request_id.encode("latin-1", "replace")


def _dp_rank(request: Request) -> int:
    """The data-parallel rank that the client names, in vLLM's header; -1 for any.

    Raises:
        ApiError: 400, it is no number.
    """
    given = request.headers.get(DP_RANK_HEADER)
    if given is None:
        return -1
    if not given.isdigit():
        raise ApiError(400, f"{DP_RANK_HEADER} is a number from 0 on, got {given!r}")
    return int(given)
