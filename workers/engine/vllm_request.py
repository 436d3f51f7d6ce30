"""One request in vLLM's own terms: validated by its request classes, sampled with its parameters, read with its parsers.

The frontend sends what the client wrote, less prompt and messages; here it becomes the very object that vLLM's API server
would make of it (vLLM 0.32), so that both accept, refuse and mean the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from http import HTTPStatus
from types import SimpleNamespace, TracebackType
from typing import Any

import msgspec
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from workers.engine import logprobs
from workers.engine.base import NO_MEMBERS, Ask, LostError, Piece, RefusedError, UnbegunError
from workers.engine.chat import Chat
from workers.engine.reader import Reader
from workers.runtime.wire import Shape

# Made by our own workers only: from a client they would end the engine, or bring another prompt's tokens (vLLM 0.32); the
# last tells of cached blocks again, which routers would count twice and keep for ever.
FORBIDDEN = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
PLACEHOLDER = [{"role": "user", "content": ""}]
_json = msgspec.json.Encoder().encode


class VllmRequest:
    """One leg of a request: `prompt` and `sampling` for the engine, and `read` for what comes back.

    Raises:
        RefusedError: vLLM's API server would refuse it too.
        UnbegunError: It was begun elsewhere and cannot be continued.
    """

    def __init__(self, reader: Reader, ask: Ask) -> None:
        self._reader = reader
        self._ask = ask
        self._chat: Chat | None = None
        with refusing():
            self.request: Any = self._validated(read_options(ask.options))
            if ask.render.shape is not Shape.COMPLETION:
                self._chat = Chat(reader, self.request, ask.render.stream, ask.render.echo or "")
                self.request = self._chat.request
            self.sampling = self._sampling()
        self._replays = bool(ask.produced) and _depends_on_output(self.sampling)
        self._skip = list(ask.produced) if self._replays else []
        self._continued = self._continue() if ask.produced else None
        self._begun = bool(ask.produced)
        self._offset = len(self._continued.said) if self._continued else 0
        self._ids: list[int] = []
        self._tops: list[Any] = []
        self._text: list[str] = []
        self._prompt_tops: list[Any] | None = None

    @property
    def prompt(self) -> list[int]:
        """Token ids for the engine."""
        return self._ask.prompt if self._replays else self._ask.prompt + self._ask.produced

    @property
    def cache_salt(self) -> str | None:
        """Keeps the prefix cache of this request apart from others'."""
        salt: str | None = self.request.cache_salt
        return salt

    def for_engine(self) -> dict[str, Any]:
        """What AsyncLLM.generate must know of a reasoning model's parser."""
        return self._chat.for_engine(self.prompt) if self._chat else {}

    def read(self, output: Any) -> Piece | None:
        """What a RequestOutput adds to the answer; None when it adds nothing.

        Raises:
            LostError: A replay went another way than the answer that it should continue.
        """
        choice = output.outputs[0]
        ids, tops = list(choice.token_ids), choice.logprobs
        text, finish, stop = choice.text, choice.finish_reason, choice.stop_reason
        if self._skip:
            ids, tops = self._past_the_seam(ids, tops, finish)
            if not ids and finish is None:
                return None
        if self._continued:
            ids, text, matched = self._continued.add(ids, finish)
            if matched is not None:
                finish, stop = "stop", matched
            if not self._ask.render.stream and not self._text:
                text = self._continued.said + text
        if output.prompt_logprobs:  # with the first output only
            self._prompt_tops = output.prompt_logprobs
        piece = Piece(ids, text, finish, stop, output.num_cached_tokens or 0, output.kv_transfer_params)
        if self._continued:
            piece.before, self._continued.before = self._continued.before, []
        first, self._begun = not self._begun, True
        if first:
            self._say_again(piece)
        if self._ask.render.stream:
            self._write_event(piece, tops, first)
        else:
            self._write_whole(piece, tops)
        return piece

    # --- what the client asked for ----------------------------------------------------------------------------------

    def _validated(self, options: dict[str, Any]) -> Any:
        own = {"stream": self._ask.render.stream}
        if self._ask.render.shape is not Shape.COMPLETION:
            return ChatCompletionRequest(**{"messages": PLACEHOLDER, **options, **own})
        limit = self._ask.max_tokens
        return CompletionRequest(**{**options, **own, "prompt": [0], "max_tokens": None if limit < 0 else limit})

    def _sampling(self) -> SamplingParams:
        ask, defaults = self._ask, self._reader.defaults
        room = self._reader.model_config.max_model_len - len(ask.prompt)
        wanted = ask.max_tokens if ask.max_tokens >= 0 else defaults.get("max_tokens", room)
        sampling = self.request.to_sampling_params(min(wanted, room), defaults)
        sampling.output_kind = RequestOutputKind.DELTA
        sampling.n = 1  # each of n answers is a leg of its own
        if ask.choice and sampling.seed is not None:
            sampling.seed += ask.choice  # else all n answers would be the same
        return sampling

    def _continue(self) -> Continuation:
        sampling, produced = self.sampling, len(self._ask.produced)
        if self._replays and sampling.temperature > 0 and sampling.seed is None:
            raise UnbegunError("an answer sampled under a grammar or penalties cannot be continued by another worker")
        continued = Continuation(self._reader.tokenizer, self._ask, sampling, self._chat)
        sampling.stop = []  # the continuation looks for them, over the seam
        if not self._replays:
            sampling.max_tokens -= produced
            sampling.min_tokens = max(0, sampling.min_tokens - produced)
        return continued

    # --- what the engine answered -----------------------------------------------------------------------------------

    def _past_the_seam(self, ids: list[int], tops: Any, finish: str | None) -> tuple[list[int], Any]:
        """Drop what the client has already; it must be the same."""
        seen = ids[: len(self._skip)]
        if seen != self._skip[: len(seen)] or (finish is not None and len(seen) < len(self._skip)):
            raise LostError("the answer came out otherwise the second time, so that it cannot be continued")
        self._skip = self._skip[len(seen) :]
        return ids[len(seen) :], tops[len(seen) :] if tops is not None else None

    def _say_again(self, piece: Piece) -> None:
        """Put the prompt before the answer where the client wants its echo."""
        if not self.request.echo or (self._chat and self._chat.parses):
            return
        said = self._ask.render.echo
        if said is None:
            said = "" if self._chat else self._reader.tokenizer.decode(self._ask.prompt, skip_special_tokens=False)
        if self.request.return_token_ids and not self._chat:
            said = ""
        piece.text = said if self._only_echo else said + piece.text

    @property
    def _only_echo(self) -> bool:
        """Whether a completion of 0 tokens was asked for: vLLM makes one to get the prompt's logprobs."""
        return self._chat is None and bool(self.request.echo) and self.request.max_tokens == 0

    def _with_prompt(self, ids: Sequence[int], tops: Any) -> tuple[Sequence[int], Any]:
        """Tokens and logprobs of a completion, the prompt's before them where the client wants its echo."""
        if self._chat or not self.request.echo:
            return ids, tops
        prompt = self._ask.prompt
        before = self._prompt_tops or [None] * len(prompt)
        return (prompt, before) if self._only_echo else ([*prompt, *ids], [*before, *(tops or [])])

    def _write_event(self, piece: Piece, tops: Any, first: bool) -> None:
        """Fill in what the client of a stream reads beside the text."""
        if self._chat:
            self._chat.read(piece, piece.text, list(piece.ids), self._ask.prompt)
        self._add_members(piece, piece.ids, *(self._with_prompt(piece.ids, tops) if first else (piece.ids, tops)))
        if first and (self.request.return_token_ids or (self.request.echo and not self._chat)):
            told = b',"prompt_token_ids":' + _json(self._ask.prompt)
            if self._chat:
                piece.extra = told
            else:
                piece.members += told
        if piece.message == b"" and (piece.finish is not None or piece.members != NO_MEMBERS):
            piece.message = b"{}"

    def _write_whole(self, piece: Piece, tops: Any) -> None:
        """Collect a unary answer, and at its end fill in what its client reads beside the text."""
        self._ids += piece.ids
        self._tops += tops or []
        self._text.append(piece.text)
        if piece.finish is None:
            return
        prompt, ids = self._ask.prompt, [*self._ask.produced, *self._ids]
        if self._chat:
            self._chat.read(piece, "".join(self._text), ids, prompt)
        self._add_members(piece, ids, *self._with_prompt(ids, self._tops))
        found = b""
        if self._prompt_tops is not None:
            found += b',"prompt_logprobs":' + logprobs.of_prompt(self._prompt_tops)
        if self.request.return_token_ids:
            found += b',"prompt_token_ids":' + _json(prompt)
        if self._chat:
            piece.extra = found
        else:
            piece.members += found

    def _add_members(self, piece: Piece, own: Sequence[int], ids: Sequence[int], tops: Any) -> None:
        """Logprobs of `ids` and token ids (`own`, without an echo), where they were asked for."""
        if self._chat and self._chat.hides_tokens:
            return
        if self._wants_logprobs and ids:
            piece.members = b'"logprobs":' + self._logprobs(ids, tops or [None] * len(ids))
        if self.request.return_token_ids:
            piece.members += b',"token_ids":' + _json(list(own))

    @property
    def _wants_logprobs(self) -> bool:
        return bool(self.request.logprobs) if self._chat else self.request.logprobs is not None

    def _logprobs(self, ids: Sequence[int], tops: Sequence[Any]) -> bytes:
        if self._chat:
            return logprobs.of_chat(self._reader.tokenizer, self.request, ids, tops)
        found, self._offset = logprobs.of_completion(self._reader.tokenizer, self.request, ids, tops, self._offset)
        return found


class Continuation:
    """The text of an answer that another worker began: its detokenizer and parser are brought to where that one's were.

    Both are functions of the ids alone, so feeding them the ids again, unheard, leaves them in the same state, whatever the
    seam cuts: a character of several bytes, a stop string, a tool call.
    """

    def __init__(self, tokenizer: Any, ask: Ask, sampling: SamplingParams, chat: Chat | None) -> None:
        request = SimpleNamespace(
            request_id=ask.request_id, prompt_token_ids=ask.prompt, prompt_embeds=None, sampling_params=sampling.clone()
        )
        self._detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self.said = ""
        self.before: list[Piece] = []
        for token in ask.produced:
            self._detokenizer.update([token], False)
            text = self._detokenizer.get_next_output_text(False, True)
            self.said += text
            message = chat.replay(text, token, ask.prompt) if chat else None
            if ask.render.shape.whole and ask.render.stream:
                self.before.append(Piece([token], text, message=message))

    def add(self, ids: list[int], finish: str | None) -> tuple[list[int], str, str | None]:
        """The ids that count, their text, and the stop string that ends the answer, if one does."""
        before = self._detokenizer.num_output_tokens()
        matched = self._detokenizer.update(ids, finish == "stop")
        text = self._detokenizer.get_next_output_text(finish is not None or matched is not None, True)
        return list(self._detokenizer.output_token_ids[before:]), text, matched


class refusing:
    """Turn vLLM's word on a bad request into RefusedError, with the status and the field that vLLM's server would name."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, RefusedError | LostError):
            return
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
            raise RefusedError(f"{first['msg']}{f' at {where}' if where else ''}", param=where or None) from error
        said = create_error_response(error).error
        if said.code == HTTPStatus.SERVICE_UNAVAILABLE:  # a full queue: another worker may have room
            raise UnbegunError(said.message) from error
        if said.code < HTTPStatus.INTERNAL_SERVER_ERROR or isinstance(error, NotImplementedError):
            raise RefusedError(said.message, said.code, said.param) from error


def read_options(packed: bytes) -> dict[str, Any]:
    """What the client asked for.

    Raises:
        RefusedError: Some of it is never taken from a client.
    """
    options: dict[str, Any] = msgspec.json.decode(packed, type=dict[str, Any])
    refuse_forbidden({*options, *(options.get("vllm_xargs") or ())})
    return options


def refuse_forbidden(sent: Collection[str]) -> None:
    """Refuse names among those that a client sent which are never taken from one.

    Raises:
        RefusedError: There is one.
    """
    for name in FORBIDDEN:
        if name in sent:
            raise RefusedError(f"{name} is made by the workers and never taken from a client", param=name)


def _depends_on_output(sampling: SamplingParams) -> bool:
    """Whether the next token depends on which tokens were *generated*, so that a prompt with them in it is not the same."""
    return bool(
        sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.structured_outputs
        or sampling.thinking_token_budget
        or sampling.bad_words
    )
