"""From messages to token ids without torch: the model's chat template and tokenizer, as transformers would apply them.

The differences to plain jinja2 follow transformers 5 (`utils/chat_template_utils.py`) and vLLM 0.32's `HfRenderer`, whose ids
the tests compare with.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from workers.frontend.errors import ApiError
from workers.runtime.wire import pack

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Text:
    """Tokenizer and chat template of one model."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()  # as transformers does; a tokenizer.json may bring limits from its training
        self._tokenizer.no_padding()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self._special = {name: _token(config[name]) for name in SPECIAL_TOKENS if config.get(name)}
        source = _template_source(folder, config)
        self._template = _environment().from_string(source) if source else None
        # A template that loops over a message's content wants it as a list of parts, any other as a string.
        self._wants_parts = bool(source) and "content" in source and "for content in" in source

    def chat(self, messages: list[dict[str, Any]], extra: dict[str, Any] | None) -> bytes:
        """Packed token ids of a conversation, the assistant's turn opened.

        Raises:
            ApiError: 400, when the template refuses the messages or there is none.
        """
        if self._template is None:
            raise ApiError(400, "the model has no chat template: use /v1/completions")
        prepared = [self._message(message, index) for index, message in enumerate(messages)]
        if not prepared:
            raise ApiError(400, "messages must not be empty", param="messages")
        try:
            text = self._template.render(
                **{"add_generation_prompt": True, "tools": None, **(extra or {})}, messages=prepared, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ApiError(400, f"the chat template refused the messages: {error}", param="messages") from error
        return self.encode(text, special=False)

    def encode(self, text: str, special: bool = True) -> bytes:
        """Packed token ids of a text; `special` adds what the tokenizer puts around a text (a begin token, mostly)."""
        return pack(self._tokenizer.encode(text, add_special_tokens=special).ids)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._tokenizer.get_vocab_size())

    def _message(self, message: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"messages[{index}]"
        if not isinstance(message.get("role"), str):
            raise ApiError(400, f"{where} has no role", param=where)
        content = message.get("content")
        if isinstance(content, list):
            texts = [_part(part, where) for part in content]
            content = [{"type": "text", "text": text} for text in texts] if self._wants_parts else "\n".join(texts)
        elif isinstance(content, str) and self._wants_parts:
            content = [{"type": "text", "text": content}]
        elif content is not None and not isinstance(content, str):
            raise ApiError(400, f"{where}.content is neither text nor a list of parts", param=where)
        return {**message, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ApiError(400, f"{where}: content of type {kind!r} is not supported yet", param=where)


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    beside = folder / "chat_template.jinja"
    if beside.exists():
        return beside.read_text()
    source = config.get("chat_template") or ""
    if isinstance(source, list):  # several named templates
        source = next((item["template"] for item in source if item.get("name") == "default"), "")
    return str(source)


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


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
