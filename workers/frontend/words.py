"""The ids of words that were seen before: short texts need not be tokenized again, whatever order their words come in.

A byte-level BPE tokenizer cuts a text into words with a regular expression, then works on each word by itself. The expressions
of nearly all models never go on over a space that follows a visible ASCII character, and none looks back, so that a text may be
cut before any such space (`cuts_at_spaces` says for which tokenizers that holds). A piece is looked up five times as fast as
it is tokenized; one that is new costs three times as much as within its text, so that a text teaches a few words and no more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

# Longer texts are tokenized in threads (`service.TOKENIZE_IN_THREAD_CHARS`), where the tokenizer does without the GIL.
MAX_TEXT_CHARS = 4096
MAX_WORD_CHARS = 48
MAX_WORDS = 1 << 16
# So many new words are tokenized one by one. Of a text with more of them so many are learned, beside the text as a whole; that
# does not pay by itself, and nor may what follows, so that the next texts are taken whole: at most a twentieth is spent on that.
MAX_NEW = 16
TEXTS_TAKEN_WHOLE = 15
# A piece begins with the spaces before it, and goes on over later ones only where the character before is not visible ASCII.
PIECE = re.compile(r" *[^ ]+(?:(?<=[^!-~]) +[^ ]*)*| +")

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD = r"[^\r\n\p{L}\p{N}]?"
# Of OpenAI's cl100k (Llama 3 and others), of Qwen 2 to 3, and of OpenAI's o200k (gpt-oss and others).
PATTERNS = frozenset(
    (
        rf"{CONTRACTIONS}|{LEAD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
        rf"{CONTRACTIONS}|{LEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
        (
            rf"{LEAD}{UPPER}*{LOWER}+{CONTRACTIONS}?|{LEAD}{UPPER}+{LOWER}*{CONTRACTIONS}?"
            rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}"
        ),
    )
)


class Words:
    """Pieces of texts and their packed ids; may be used from several threads.

    Args:
        encode: Packed ids of several texts, as the tokenizer has them.
        max_words: Pieces that are kept; one more, and all are learned anew.
    """

    def __init__(self, encode: Callable[[list[str]], list[bytes]], max_words: int = MAX_WORDS) -> None:
        self._encode = encode
        self._max_words = max_words
        self._known: dict[str, bytes] = {}
        self._taken_whole = 0
        """Texts that are still taken whole."""

    def encode(self, text: str) -> bytes:
        """Packed ids of a text."""
        if self._taken_whole:
            self._taken_whole -= 1
            return self._encode([text])[0]
        if len(text) > MAX_TEXT_CHARS:
            return self._encode([text])[0]
        pieces = PIECE.findall(text)
        found: list[bytes | None] = list(map(self._known.get, pieces))
        if None not in found:
            return b"".join(found)  # type: ignore[arg-type]  # mypy does not see that none is None
        unknown = list(dict.fromkeys(piece for piece, ids in zip(pieces, found, strict=True) if ids is None))
        if len(unknown) > MAX_NEW:
            self._taken_whole = TEXTS_TAKEN_WHOLE
            self._learn(unknown[:MAX_NEW])
            return self._encode([text])[0]
        learned = self._learn(unknown)
        return b"".join([learned[piece] if ids is None else ids for piece, ids in zip(pieces, found, strict=True)])

    def _learn(self, pieces: list[str]) -> dict[str, bytes]:
        # One by one: several at once go to the tokenizer's threads, which costs more than such short texts do.
        learned = {piece: self._encode([piece])[0] for piece in pieces}
        if len(self._known) + len(learned) > self._max_words:
            self._known.clear()
        self._known.update((piece, ids) for piece, ids in learned.items() if len(piece) <= MAX_WORD_CHARS)
        return learned


def cuts_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut before each space that follows a visible ASCII character, without changing its ids.

    That is so where nothing before the model looks over such a place: the normalizer (NFC composes nothing with a space), the
    added tokens (none holds a space or takes those that follow it), and the expression that finds words.
    """
    model, normalizer, splitter = tokenizer.model, tokenizer.normalizer, tokenizer.pre_tokenizer
    if type(model).__name__ != "BPE" or model.dropout or splitter is None:
        return False
    if normalizer is not None and _described(normalizer) != {"type": "NFC"}:
        return False
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.rstrip or re.search(r"\s", token.content) for token in added):
        return False
    found = _described(splitter)
    if found["type"] == "Sequence" and len(found["pretokenizers"]) == 2:
        split, found = found["pretokenizers"]
        wanted = {"type": "Split", "behavior": "Isolated", "invert": False}
        pattern = split.pop("pattern", {}).get("Regex")
        return split == wanted and pattern in PATTERNS and _is_byte_level(found, finds_words=False)
    return _is_byte_level(found, finds_words=True)


def _is_byte_level(step: dict[str, Any], finds_words: bool) -> bool:
    """Whether a step is the byte level of GPT-2, with its expression or without."""
    return step["type"] == "ByteLevel" and not step["add_prefix_space"] and step["use_regex"] is finds_words


def _described(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as tokenizer.json has it."""
    described: dict[str, Any] = json.loads(part.__getstate__())  # as it is pickled
    return described
