"""What a client says of who should answer, and what else of its request decides which KV blocks fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.runtime.blocks import chain, root

WORKER_HEADER = "x-baton-worker"
SESSION_HEADER = "x-session-id"
SKETCHED = "\0sketch\0"  # so that no text is taken for the token ids that its bytes would be


class Wishes:
    """Of one prompt; several answers to it share this, and with it the names of its blocks.

    Attributes:
        session: What the client calls its session, or empty.
        members: Workers that it names, one for each kind at most.
        salt: Keeps its blocks apart from those of others (vLLM's `cache_salt`).
        sketch: Stands for the token ids of a prompt that a worker makes (`workers.frontend.sources.sketch`), or is empty.
    """

    __slots__ = ("_names", "members", "salt", "session", "sketch")

    def __init__(
        self,
        session: str = "",
        members: tuple[str, ...] = (),
        salt: str = "",
        sketch: bytes = b"",
    ) -> None:
        self.session = session
        self.members = members
        self.salt = salt
        self.sketch = sketch
        self._names: dict[int, list[int]] = {}

    def names(self, prompt: bytes, adapter: str, block_size: int) -> list[int]:
        """Names of the prompt's full blocks, or of its sketch's where there is one, computed once for a size."""
        if not (self.sketch or prompt):  # a worker is to make it
            return []
        names = self._names.get(block_size)
        if names is None:
            begin = root(adapter, f"{SKETCHED}{self.salt}" if self.sketch else self.salt)
            names = self._names[block_size] = chain(self.sketch or prompt, block_size, begin)
        return names


def wishes(headers: Mapping[str, str], fields: Mapping[str, Any]) -> Wishes:
    """Those of a request, by its headers and the fields of its body."""
    told = (headers.get(SESSION_HEADER), fields.get("prompt_cache_key"), fields.get("user"))
    session = next((word for word in told if isinstance(word, str) and word), "")
    salt = fields.get("cache_salt")
    named = tuple(name.strip() for name in headers.get(WORKER_HEADER, "").split(",") if name.strip())
    return Wishes(session, named, salt if isinstance(salt, str) else "")
