"""What a client says of who should answer, and what else of its request decides which KV blocks fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workers.runtime.blocks import chain, media_extras, root

WORKER_HEADER = "x-baton-worker"
SESSION_HEADER = "x-session-id"


class Wishes:
    """Of one prompt; several answers to it share this, and with it the names of its blocks.

    Attributes:
        session: What the client calls its session, or empty.
        members: Workers that it names, one for each kind at most.
        salt: Keeps its blocks apart from those of others (vLLM's `cache_salt`).
        media: For each image (or the like) in the prompt its identifier and the first and number of its placeholder tokens.
    """

    __slots__ = ("_names", "media", "members", "salt", "session")

    def __init__(
        self,
        session: str = "",
        members: tuple[str, ...] = (),
        salt: str = "",
        media: Sequence[tuple[str, int, int]] = (),
    ) -> None:
        self.session = session
        self.members = members
        self.salt = salt
        self.media = media
        self._names: dict[tuple[int, int], list[int]] = {}

    def names(self, prompt: bytes, adapter: str, block_size: int) -> list[int]:
        """Names of the prompt's full blocks, computed once for a size."""
        names = self._names.get((block_size, len(prompt)))  # a prompt that a worker makes comes later
        if names is None:
            extras = media_extras(block_size, self.media) if self.media else {}
            names = self._names[block_size, len(prompt)] = chain(prompt, block_size, root(adapter, self.salt), extras)
        return names


def wishes(headers: Mapping[str, str], fields: Mapping[str, Any]) -> Wishes:
    """Those of a request, by its headers and the fields of its body."""
    told = (headers.get(SESSION_HEADER), fields.get("prompt_cache_key"), fields.get("user"))
    session = next((word for word in told if isinstance(word, str) and word), "")
    salt = fields.get("cache_salt")
    named = tuple(name.strip() for name in headers.get(WORKER_HEADER, "").split(",") if name.strip())
    return Wishes(session, named, salt if isinstance(salt, str) else "")
