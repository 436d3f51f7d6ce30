"""Text to token ids, fast: outside the GIL, and a turn of a conversation once.

A tokenizer first splits a text at its *added tokens* (`<|user|>` and the like), then works on each piece by itself. So the
ids of a conversation are those of its turns put together, and what was said before need not be tokenized again. Turns are
kept, up to a bound, least recently used first out. Only splits that cannot change the result are made (`boundaries`). A turn
that is new is mostly made of words that are not (`workers.frontend.words`).
"""

from __future__ import annotations

import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer

from workers.frontend.words import Words, cuts_at_spaces
from workers.runtime.wire import pack

MAX_CACHED_BYTES = 16 << 20
ENTRY_BYTES = 200  # of a turn in the cache, beside its text and its ids


class Tokens:
    """A tokenizer, and the turns that it has seen; may be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, max_cached_bytes: int = MAX_CACHED_BYTES) -> None:
        self._tokenizer = tokenizer
        self._max_cached_bytes = max_cached_bytes
        marks = boundaries(list(tokenizer.get_added_tokens_decoder().values()))
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None
        self._words = Words(self._encode) if cuts_at_spaces(tokenizer) else None
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def encode(self, text: str, special: bool) -> bytes:
        """Packed token ids of a text; `special` adds what the tokenizer puts around a text (a begin token, mostly)."""
        if special:
            return self._encode([text], special)[0]
        if self._marks is None:
            return self._encode_turns([text])[0]
        turns = self._turns(text)
        with self._lock:
            found = {turn: self._recall(turn) for turn in turns}
        missing = [turn for turn, ids in found.items() if not ids]
        if missing:
            for turn, ids in zip(missing, self._encode_turns(missing), strict=True):
                found[turn] = ids
            with self._lock:
                for turn in missing:
                    self._keep(turn, found[turn])
        return b"".join([found[turn] for turn in turns])

    def _turns(self, text: str) -> list[str]:
        """The text cut before each mark. Searched for as they are: a pattern that looks ahead is tried at each character."""
        assert self._marks is not None
        cuts = [mark.start() for mark in self._marks.finditer(text) if mark.start()]
        return [text[start:end] for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True)]

    def _encode_turns(self, turns: list[str]) -> list[bytes]:
        return self._encode(turns) if self._words is None else [self._words.encode(turn) for turn in turns]

    def _encode(self, texts: list[str], special: bool = False) -> list[bytes]:
        # `encode` holds the GIL, and works out offsets that nobody asks for.
        return [pack(item.ids) for item in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

    def _recall(self, turn: str) -> bytes:
        """The ids of a turn, none when it is not known (or has none)."""
        ids = self._cache.get(turn, b"")
        if ids:
            self._cache.move_to_end(turn)
        return ids

    def _keep(self, turn: str, ids: bytes) -> None:
        size = _size(turn, ids)
        if not ids or turn in self._cache or size > self._max_cached_bytes // 8:
            return
        self._cache[turn] = ids
        self._cached_bytes += size
        while self._cached_bytes > self._max_cached_bytes:
            self._cached_bytes -= _size(*self._cache.popitem(last=False))


def _size(turn: str, ids: bytes) -> int:
    """Bytes of memory that a turn takes: its ids may weigh more than its text, and so may the entry of a short one."""
    return sys.getsizeof(turn) + sys.getsizeof(ids) + ENTRY_BYTES


def boundaries(added: Sequence[AddedToken]) -> list[str]:
    """The added tokens before which a text may be cut without changing its ids.

    They are found in the text as it is (not normalized), leave what is around them alone, and share no characters with
    another added token, wherever the two may meet: what is found then does not depend on what comes before.
    """
    contents = {token.content for token in added}
    beginnings = {text[:end] for text in contents for end in range(1, len(text) + 1)}
    endings = {text[start:] for text in contents for start in range(len(text))}

    def alone(text: str) -> bool:
        begins_another = any(text[start:] in beginnings for start in range(1, len(text)))
        ends_another = any(text[:end] in endings for end in range(1, len(text)))
        return not begins_another and not ends_another and sum(text in other for other in contents) == 1

    return sorted(
        token.content
        for token in added
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and not token.content[:1].isalnum()
        and alone(token.content)
    )
