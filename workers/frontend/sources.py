"""Which prompts the frontend makes itself, and what a worker is sent to make the others of.

A worker's prompt is always right, for it is vLLM's own; the frontend's spares the worker the work, and lets the router see
the ids. So the frontend leaves to a worker whatever it is not sure of: media, and models whose messages only vLLM's code can
turn into a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from xxhash import xxh3_128_digest

from launch.recipe import Tokenize
from workers.runtime.blocks import TOKEN_BYTES

# `tokenizer_mode` of models that a chat template and a tokenizer.json describe in full.
PLAIN_MODES = ("auto", "hf", "slow")
# Models whose prompt vLLM 0.32 writes in code (renderers/registry.py, config/model.py).
CODED = {
    "GptOssForCausalLM",
    "MoonshotKimiaForCausalLM",
    "KimiK3ForConditionalGeneration",
    "DeepseekV32ForCausalLM",
    "DeepseekV4ForCausalLM",
    "DeepseekV4ForConditionalGeneration",
    "DeepseekV41ForCausalLM",
    "InklingForCausalLM",
    "InklingForConditionalGeneration",
}
NEEDED = ("tokenizer.json", "tokenizer_config.json")
MISTRAL = ("tekken.json", "tokenizer.model.v*")
CHARS_PER_TOKEN = 4
MEDIUM_TOKENS = 1024


def worker_tokenizes(wanted: Tokenize, folder: Path, arguments: Mapping[str, Any]) -> bool:
    """Whether workers make every prompt of this model, also those without media.

    Args:
        wanted: What the recipe says.
        folder: The model.
        arguments: The engines' vLLM arguments, as the recipe has them.
    """
    if wanted is not Tokenize.AUTO:
        return wanted is Tokenize.WORKER
    if str(arguments.get("tokenizer_mode") or "auto").lower() not in PLAIN_MODES or arguments.get("tokenizer"):
        return True
    if any(not (folder / name).is_file() for name in NEEDED) or any(next(folder.glob(name), None) for name in MISTRAL):
        return True
    config = _read(folder / "config.json")
    if CODED & set(config.get("architectures") or ()):
        return True
    # Where the processor of a multimodal model keeps its template: the tokenizer's files have none.
    templates = (folder / "chat_template.jinja").is_file() or _read(folder / "tokenizer_config.json").get(
        "chat_template"
    )
    given = templates or arguments.get("chat_template")
    return not given and (folder / "chat_template.json").is_file()


def has_media(messages: list[dict[str, Any]]) -> bool:
    """Whether a conversation has parts that are not text."""
    return any(not _is_text(part) for message in messages for part in _parts(message))


def source(**fields: Any) -> bytes:
    """What a worker makes a prompt of: `messages=` as the client sent them, or `prompt=`."""
    return msgspec.json.encode(fields)


def guess(fields: Mapping[str, Any]) -> int:
    """About how many tokens the prompt will have: for the router, which weighs it before it is made."""
    prompt = fields.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else [item for item in prompt or () if isinstance(item, str)]
    if texts:  # one number stands for each of several prompts
        return 1 + sum(map(len, texts)) // len(texts) // CHARS_PER_TOKEN
    found = 1
    for message in fields.get("messages") or ():
        for part in _parts(message):
            found += len(_text(part)) // CHARS_PER_TOKEN if _is_text(part) else MEDIUM_TOKENS
    return found


def sketch(fields: Mapping[str, Any]) -> bytes:
    """What stands for the token ids of a prompt that a worker makes: equal as far as two prompts begin alike.

    Four bytes of text stand for a token, as in `guess`; a medium is as many tokens as it counts for there, all of its digest. What a
    worker will call the blocks cannot be known here: vLLM hashes decoded pixels, and only its processor knows how many
    placeholder tokens they take.
    """
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt.encode()
    if prompt is not None:  # several prompts have no beginning in common that is known
        return b""
    parts = []
    for message in fields.get("messages") or ():
        parts.append(f"\n{message.get('role')}: ".encode())
        for part in _parts(message):
            if _is_text(part):
                parts.append(_text(part).encode())
            else:
                digest = xxh3_128_digest(msgspec.json.encode(part))
                parts.append(digest * (MEDIUM_TOKENS * TOKEN_BYTES // len(digest)))
    return b"".join(parts)


def spoken(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation without its media, for parsers that look back at what was said."""
    return [
        message
        if isinstance(message.get("content"), str | None)
        else {**message, "content": [part for part in _parts(message) if _is_text(part)]}
        for message in messages
    ]


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else [content] if isinstance(content, str) else []


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text")


def _text(part: Any) -> str:
    return part if isinstance(part, str) else str(part.get("text"))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
