"""What a prefill engine hands to a decode engine through the frontend: opaque bytes, made and checked by workers only.

vLLM 0.32 trusts these parameters: a missing or malformed field ends the decode engine's process, and a pull after the
lease, or a second one, silently brings another prompt's tokens. So they are checked against the request before the engine
sees them; that they are used once, and in time, is the frontend's duty (`workers.frontend.exchange`).
"""

from __future__ import annotations

from typing import Any

import msgspec

# A transfer is not used within this time of its lease's end: the pull itself takes time, and clocks of the two engines
# start at different moments.
MARGIN_S = 5.0

FIELDS: dict[str, type | tuple[type, ...]] = {
    "do_remote_prefill": bool,
    "do_remote_decode": bool,
    "remote_block_ids": (list, tuple),
    "remote_engine_id": str,
    "remote_request_id": str,
    "remote_host": str,
    "remote_port": int,
    "tp_size": int,
    "remote_num_tokens": int,
    "transfer_mode": str,
}


class TransferError(Exception):
    """The parameters do not belong to this request."""


def pack(transfer: dict[str, Any]) -> bytes:
    """As it travels through the frontend."""
    return msgspec.msgpack.encode(transfer)


def unpack(packed: bytes, prompt_tokens: int, block_size: int) -> dict[str, Any]:
    """The parameters for the engine, unknown fields untouched.

    Args:
        packed: What a prefill worker of this deployment returned.
        prompt_tokens: Length of the prompt of the decode leg.
        block_size: Tokens in a KV block, the same on both sides.

    Raises:
        TransferError: Says which field is wrong.
    """
    transfer = _decoded(packed)
    for name, kind in FIELDS.items():
        if not isinstance(transfer.get(name), kind):
            raise TransferError(f"transfer parameters: {name} is {transfer.get(name)!r}")
    if not transfer["do_remote_prefill"] or transfer["transfer_mode"] != "pull":
        raise TransferError(f"transfer parameters ask for {transfer['transfer_mode']!r}, not for a pull")
    if transfer["remote_num_tokens"] != prompt_tokens:
        raise TransferError(f"transfer of {transfer['remote_num_tokens']} tokens for a prompt of {prompt_tokens}")
    blocks = -(-prompt_tokens // block_size)
    groups = transfer["remote_block_ids"]
    if not groups or any(not isinstance(group, list | tuple) or len(group) != blocks for group in groups):
        raise TransferError(f"transfer parameters: remote_block_ids are not {blocks} blocks in each group")
    return transfer


def tokens(packed: bytes) -> int:
    """Length of the prompt whose KV cache is handed on, as its prefill worker said.

    Raises:
        TransferError: It does not say.
    """
    found = _decoded(packed).get("remote_num_tokens")
    if not isinstance(found, int):
        raise TransferError(f"transfer parameters: remote_num_tokens is {found!r}")
    return found


def peer(packed: bytes) -> tuple[str, int]:
    """Where the prefill engine answers handshakes: host and port.

    Raises:
        TransferError: It does not say.
    """
    found = _decoded(packed)
    host, port = found.get("remote_host"), found.get("remote_port")
    if not isinstance(host, str) or not isinstance(port, int):
        raise TransferError(f"transfer parameters: remote_host is {host!r} and remote_port {port!r}")
    return host, port


def _decoded(packed: bytes) -> dict[str, Any]:
    try:
        return msgspec.msgpack.decode(packed, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TransferError(f"transfer parameters cannot be read: {error}") from error
