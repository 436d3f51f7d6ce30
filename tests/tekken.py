"""The tiny model with a tokenizer of Mistral's own kind: no tokenizer.json, no chat template, a prompt that only code can make."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from launch.tiny_model import VOCAB

SPECIALS = 64
CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *(
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "[IMG]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[PREFIX]",
        "[MIDDLE]",
        "[SUFFIX]",
    ),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}]+|\p{N}|\s+|[^\s\p{L}\p{N}]+"


def make_mistral_model(tiny_model: Path, folder: Path) -> Path:
    """A copy of the tiny model in the folder, with a tekken.json instead of its tokenizer's files."""
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(tiny_model / name, folder)
    words = _words(Tokenizer.from_file(str(tiny_model / "tokenizer.json")))
    vocab = [bytes([number]) for number in range(256)] + words
    vocab = vocab[: VOCAB - SPECIALS]
    content = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": VOCAB,
            "default_num_special_tokens": SPECIALS,
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": _shown(token)}
            for rank, token in enumerate(vocab)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(CONTROL)
        ],
    }
    (folder / "tekken.json").write_text(json.dumps(content))
    return folder


def _words(tokenizer: Tokenizer) -> list[bytes]:
    """Texts of several bytes, each made of an earlier one and one byte more: what a byte-pair encoding can merge."""
    found: dict[bytes, None] = {}
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token]).encode()
        for end in range(2, len(text) + 1):
            found.setdefault(text[:end])
    return list(found)


def _shown(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None
