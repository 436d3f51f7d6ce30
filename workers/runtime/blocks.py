"""Names of KV cache blocks that frontends and workers agree on without asking: hashes of token ids, chained by parent.

Two blocks have one name only if all tokens up to their ends are equal, and with them whatever else an engine keeps apart:
the LoRA adapter, the cache salt, and the images (or the like) that placeholder tokens stand for. vLLM's own hashes will
not do: what goes into them changes with its version and options. A name is 64 bits of XXH3, fast and not a secret: whoever
finds two prompts of one name gets a request routed badly, never answered wrongly.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence

from xxhash import xxh3_64_intdigest

TOKEN_BYTES = 4
NO_EXTRAS: Mapping[int, bytes] = {}


def root(adapter: str = "", salt: str = "") -> int:
    """The parent of a prompt's first block."""
    if not adapter and not salt:
        return 0
    return xxh3_64_intdigest(f"{len(adapter)}:{adapter}{salt}".encode())


def chain(ids: bytes, block_size: int, parent: int, extras: Mapping[int, bytes] = NO_EXTRAS) -> list[int]:
    """The names of all full blocks.

    Args:
        ids: Token ids as packed little-endian 32-bit numbers (`workers.runtime.wire.pack`).
        block_size: Tokens of a block.
        parent: Name of the block before, or `root`.
        extras: By number of the block, what it holds beside tokens (`media_extras`).
    """
    names = []
    step = block_size * TOKEN_BYTES
    name = parent
    digest = xxh3_64_intdigest
    if not extras:
        for end in range(step, len(ids) + 1, step):
            name = digest(ids[end - step : end], name)
            names.append(name)
        return names
    for number, end in enumerate(range(step, len(ids) + 1, step)):
        name = digest(ids[end - step : end] + extras.get(number, b""), name)
        names.append(name)
    return names


def media_extras(block_size: int, media: Iterable[tuple[str, int, int]]) -> dict[int, bytes]:
    """What blocks hold beside tokens.

    Args:
        block_size: Tokens of a block.
        media: For each image (or the like) its identifier, and the first and the number of its placeholder tokens.
    """
    found: dict[int, list[tuple[str, int]]] = {}
    for identifier, offset, length in sorted(media, key=lambda item: item[1]):
        for number in range(offset // block_size, -(-(offset + length) // block_size)):
            found.setdefault(number, []).append((identifier, offset - number * block_size))
    return {number: extra(pairs) for number, pairs in found.items()}


def extra(pairs: Sequence[tuple[str, int]]) -> bytes:
    """Identifiers of what a block holds beside tokens, each with its offset from the block's first token."""
    return b"".join(f"|{identifier}@{offset}".encode() for identifier, offset in pairs)


def pack_names(names: Iterable[int]) -> bytes:
    """Names as packed little-endian 64-bit numbers."""
    packed = array("Q", names)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_names(packed: bytes) -> list[int]:
    """The inverse of `pack_names`."""
    names = array("Q")
    names.frombytes(packed)
    if sys.byteorder == "big":
        names.byteswap()
    return names.tolist()
