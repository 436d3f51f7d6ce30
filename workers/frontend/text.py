"""From messages to token ids without torch: the model's chat template and tokenizer, as transformers would apply them.

The differences to plain jinja2 follow transformers 5 (`utils/chat_template_utils.py`) and vLLM 0.32's `HfRenderer`, whose ids
the tests compare with.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from workers.frontend.errors import ApiError
from workers.frontend.turns import Tokens

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Text:
    """Tokenizer and chat template of one model."""

    def __init__(
        self,
        folder: Path,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        context: Callable[[], int] = lambda: 0,
    ) -> None:
        """`context` is the context length of the model now, 0 while nobody knows it."""
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()  # as transformers does; a tokenizer.json may bring limits from its training
        self._tokenizer.no_padding()
        self._tokens = Tokens(self._tokenizer)
        self._context = context
        self._longest = max((len(token) for token in self._tokenizer.get_vocab()), default=1)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self._special = {name: _token(config[name]) for name in SPECIAL_TOKENS if config.get(name)}
        source, with_tools = _template_sources(folder, config) if chat_template is None else (_given(chat_template), "")
        self._template = _compiled(source) if source else None
        self._tool_template = _compiled(with_tools) if with_tools else self._template
        self._variables = dict(variables or {})
        self._knows_developer = '"developer"' in source or "'developer'" in source
        # A template that loops over a message's content wants it as a list of parts, any other as a string.
        self._wants_parts = bool(source) and "content" in source and "for content in" in source

    def chat(
        self,
        messages: list[dict[str, Any]],
        variables: Mapping[str, Any],
        tools: list[dict[str, Any]] | None = None,
        continue_final: bool = False,
        special: bool = False,
    ) -> bytes:
        """Packed token ids of a conversation, the assistant's turn opened.

        Args:
            messages: As the client sent them.
            variables: What the template may use beside them.
            tools: Functions that the model may call, as the client sent them.
            continue_final: Leave the last message open, to be gone on with.
            special: Whether the tokenizer adds what it puts around a text; templates write that themselves.

        Raises:
            ApiError: 400, when the template refuses the messages or there is none.
        """
        template = self._tool_template if tools else self._template
        if template is None:
            raise ApiError(400, "the model has no chat template: use /v1/completions")
        prepared = [self._message(message, index) for index, message in enumerate(messages)]
        if not prepared:
            raise ApiError(400, "messages must not be empty", param="messages")
        if not self._knows_developer and any(item["role"] == "developer" for item in prepared):
            prepared = _without_developer(prepared)
        if continue_final:
            prepared[-1] = _tagged(prepared[-1])
        known = {"tools": [_tool(tool, index) for index, tool in enumerate(tools)] if tools else None}
        try:
            text = template.render(
                **{"add_generation_prompt": True, **self._variables, **variables, **known},
                messages=prepared,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ApiError(400, f"the chat template refused the messages: {error}", param="messages") from error
        return self.encode(_open_ended(text) if continue_final else text, special=special)

    def encode(self, text: str, special: bool = True) -> bytes:
        """Packed token ids of a text; `special` adds what the tokenizer puts around a text (a begin token, mostly).

        Raises:
            ApiError: 400, the text is too long for the context however few tokens it has: to count them would take minutes.
        """
        context = self._context()
        if context and len(text) > context * self._longest:
            raise ApiError(
                400,
                f"this model's maximum context length is {context} tokens, which a text of {len(text)} characters exceeds: "
                "shorten it",
            )
        return self._tokens.encode(text, special)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens and all."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def token_texts(self, ids: list[int]) -> list[str | None]:
        """Each token as the tokenizer writes it."""
        return [self._tokenizer.id_to_token(token) for token in ids]

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._tokenizer.get_vocab_size())

    def _message(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"messages[{index}]"
        if not isinstance(message.get("role"), str):
            raise ApiError(400, f"{where} has no role", param=where)
        content = message.get("content")
        if content is None:
            content = []
        elif isinstance(content, str):
            content = [content]
        elif not isinstance(content, list):
            raise ApiError(400, f"{where}.content is neither text nor a list of parts", param=where)
        texts = [_part(part, where) for part in content]
        parts = self._wants_parts and message["role"] != "tool"
        content = [{"type": "text", "text": text} for text in texts] if parts else "\n".join(texts)
        prepared = {**message, "content": content}
        calls = message.get("tool_calls")
        if calls is not None and message["role"] == "assistant":
            prepared.pop("tool_calls")
            if calls:
                prepared["tool_calls"] = [_call(call, where) for call in calls]
        thought = message.get("reasoning", message.get("reasoning_content"))
        if thought is not None:
            prepared["reasoning"] = prepared["reasoning_content"] = thought
        return prepared


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call of the conversation with its arguments as templates want them: an object, not its JSON.

    Members are in the order of vLLM's request classes, for templates write them out as they come. Calls whose arguments
    are an object already come from another API, where vLLM leaves them in their own order.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ApiError(400, f"{where}.tool_calls has an entry without a function", param=where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except ValueError:
            arguments = {}
    told = {"arguments": arguments if isinstance(arguments, dict) else {}, "name": function.get("name")}
    if isinstance(function.get("arguments"), dict):
        told = {name: function.get(name) for name in ("name", "arguments")}
    return {"id": call.get("id"), "function": told, "type": call.get("type", "function")}


def _tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    """A tool as vLLM's request classes hand it to the template: the known fields, absent ones as null."""
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"tools[{index}] has no function with a name", param="tools")
    told = {name: function.get(name) for name in ("name", "description", "parameters")}
    told |= {name: function[name] for name in ("strict", "defer_loading") if function.get(name) is not None}
    return {"type": tool.get("type", "function"), "function": told}


def _without_developer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for a template that has only a system role, which must come first: one message holds what all said."""
    ruling = [item for item in messages if item["role"] in ("system", "developer")]
    rest = [item for item in messages if item["role"] not in ("system", "developer")]
    if ruling == messages[: len(ruling)] and len(ruling) == 1:
        return [{**ruling[0], "role": "system"}, *rest]
    said = (_plain(item["content"]) for item in ruling)
    return [{"role": "system", "content": "\n\n".join(text for text in said if text)}, *rest]


def _plain(content: Any) -> str:
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


FINAL = "CONTINUE_FINAL_MESSAGE_TAG "


def _tagged(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a mark where the model is to go on."""
    content = message["content"]
    if isinstance(content, list) and content:
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + FINAL}]}
    return {**message, "content": (content or "") + FINAL}


def _open_ended(text: str) -> str:
    """The rendered conversation up to the mark."""
    at = text.rfind(FINAL.strip())
    if at < 0:
        raise ApiError(400, "the chat template does not show the final message, so it cannot be continued")
    return text[:at] if text.startswith(FINAL, at) else text[:at].rstrip()


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ApiError(
        400,
        f"{where}: content of type {kind!r} cannot be tokenized by a frontend",
        param=where,
    )


def _template_sources(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """The model's chat template, and the one for tools where it has one of its own."""
    beside = folder / "chat_template.jinja"
    if beside.exists():
        return beside.read_text(), ""
    source = config.get("chat_template") or ""
    if isinstance(source, list):  # several named templates
        named = {item.get("name"): item["template"] for item in source}
        return named.get("default", ""), named.get("tool_use", "")
    return str(source), ""


def _given(chat_template: str) -> str:
    """A template that the recipe names by its path, or writes out."""
    return chat_template if {"{", "\n"} & set(chat_template) else Path(chat_template).read_text()


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _compiled(source: str) -> jinja2.Template:
    template = _environment().from_string(source)
    # jinja2 has a chain of mappings there, and copies it for each rendering: a tenth of all that a request costs.
    template.globals = dict(template.globals)
    return template


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    # jinja2's own escapes HTML characters; the models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; in serving it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Any) -> Any:
        """jinja2.ext.Extension."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
