"""A chat's answer beyond its text: reasoning and tool calls, read with vLLM's own parsers (0.32)."""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionNamedToolChoiceParam, ChatCompletionRequest
from vllm.renderers.chat_utils import make_tool_call_id

from workers.engine.base import Piece, RefusedError
from workers.engine.reader import Reader

_json = msgspec.json.Encoder().encode


class Chat:
    """The reader of one chat answer. `request` is the client's, as the parser wants it (a grammar for tool calls, say).

    Raises:
        RefusedError: Tools were asked for and no parser is there to read them.
    """

    def __init__(self, reader: Reader, request: ChatCompletionRequest, stream: bool, echo: str) -> None:
        self._reader = reader
        self._stream = stream
        self._echo = echo
        self._refuse_unreadable(request)
        params = request.build_chat_params(reader.serving.chat_template, "auto")
        self._template_kwargs = params.with_defaults(
            dict(reader.serving.default_chat_template_kwargs)
        ).chat_template_kwargs
        self.request = self._adjusted(request) if reader.parser else request
        self._parser = self._new_parser(self.request) if reader.parser else None
        self._called_tools = False
        self._ids: list[int] = []

    @property
    def parses(self) -> bool:
        """Whether the answer is more than its text."""
        return self._parser is not None

    @property
    def hides_tokens(self) -> bool:
        """Whether token ids and logprobs are withheld, because they would show reasoning that is not to be shown."""
        return self._parser is not None and not self.request.include_reasoning

    def for_engine(self, prompt: list[int]) -> dict[str, Any]:
        """What AsyncLLM.generate must know, so that a grammar begins after the reasoning."""
        thinks = self._parser is not None and self._parser.reasoning_parser is not None
        return {
            "reasoning_ended": self.request.resolve_reasoning_ended(self._parser, prompt),
            "reasoning_parser_kwargs": {"chat_template_kwargs": self._template_kwargs} if thinks else None,
        }

    def replay(self, text: str, token: int, prompt: list[int]) -> bytes | None:
        """Take note of a token that the client has already got the text of; returns what was said with it (Piece.message)."""
        self._echo = ""
        if self._stream and self._parser is not None:
            return self._delta(text, [token], prompt, finished=False)
        return None

    def read(self, piece: Piece, text: str, ids: list[int], prompt: list[int]) -> None:
        """Set the piece's message, and at its end its finish reason and count of reasoning tokens.

        Args:
            piece: What came.
            text: Its text; at the end of a unary answer the whole text.
            ids: Its token ids; at the end of a unary answer all of them.
            prompt: Token ids of the prompt.
        """
        if self._parser is None:
            return
        echo, self._echo = self._echo, ""
        if self._stream:
            piece.message = self._delta(text, ids, prompt, finished=piece.finish is not None, echo=echo)
            named = isinstance(self.request.tool_choice, ChatCompletionNamedToolChoiceParam)
            if piece.finish == "stop" and self._called_tools and not named:
                piece.finish = "tool_calls"
        else:
            self._whole(piece, text, ids, prompt, echo)
        if piece.finish is not None and self._reader.serving.reasoning_parser:
            piece.reasoning_tokens = self._parser.count_reasoning_tokens(tuple(self._ids))

    def _refuse_unreadable(self, request: ChatCompletionRequest) -> None:
        """As vLLM's server does: tools that nobody can read would come out as text."""
        choice = request.tool_choice
        if choice in (None, "none") or (self._reader.parser is not None and self._reader.parser.tool_parser_cls):
            return
        raise RefusedError(
            f"tool_choice {choice if isinstance(choice, str) else choice.function.name!r} needs a parser of the model's "
            "tool calls: launch with engine.args.tool_call_parser=<name>",
            param="tool_choice",
        )

    def _adjusted(self, request: ChatCompletionRequest) -> Any:
        parser = self._reader.parser
        if parser.always_adjust_request or parser.reasoning_parser_cls is not None or request.tool_choice != "none":
            return self._new_parser(request).adjust_request(request=request)
        return request

    def _new_parser(self, request: Any) -> Any:
        return self._reader.parser(
            self._reader.tokenizer,
            request.tools,
            chat_template_kwargs=self._template_kwargs,
            model_config=self._reader.model_config,
        )

    def _delta(self, text: str, ids: list[int], prompt: list[int], *, finished: bool, echo: str = "") -> bytes:
        assert self._parser is not None
        self._ids += ids
        message = self._parser.parse_delta(
            delta_text=text, delta_token_ids=ids, request=self.request, prompt_token_ids=prompt, finished=finished
        )
        if message is None:
            return b'{"content":%b}' % _json(echo) if echo else b""
        if message.tool_calls:
            if self.request.parallel_tool_calls is False:
                message.tool_calls = [call for call in message.tool_calls if call.index == 0]
            self._called_tools = True
        if echo:
            message.content = echo + (message.content or "")
        return bytes(message.model_dump_json(exclude_unset=True).encode())

    def _whole(self, piece: Piece, text: str, ids: list[int], prompt: list[int], echo: str) -> None:
        if piece.finish is None:
            return
        assert self._parser is not None
        self._ids = ids
        request = self.request
        self._parser.set_prompt_token_ids(prompt)
        auto = self._reader.serving.enable_auto_tool_choice
        reasoning, content, calls = self._parser.parse(
            text, request, enable_auto_tools=auto, model_output_token_ids=ids
        )
        if request.parallel_tool_calls is False and calls:
            calls = calls[:1]
        named = isinstance(request.tool_choice, ChatCompletionNamedToolChoiceParam)
        required = request.tool_choice == "required"
        if not (named or required or (auto and request.tools and request.tool_choice in (None, "auto"))):
            calls = None
        message: dict[str, Any] = {"role": "assistant", "content": echo + (content or "") if echo else content}
        if reasoning is not None and request.include_reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["tool_calls"] = [
                {
                    "id": call.id or make_tool_call_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ]
        piece.message = _json(message)
        if (calls and not named and not required) or (required and piece.finish == "stop"):
            piece.finish = "tool_calls"
