"""Transfer parameters that vLLM would die of, or answer with another prompt's tokens, do not reach it."""

from __future__ import annotations

from typing import Any

import pytest

from workers.engine import transfer

# As vLLM 0.32's NixlConnector returns them for a prompt of 300 tokens and blocks of 32.
GOOD: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [list(range(10))],
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "10.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
    "dcp_size": 1,
    "remote_num_tokens": 300,
    "remote_blocks_expiry_time": None,
    "transfer_mode": "pull",
}


def test_good_parameters_pass_with_their_unknown_fields() -> None:
    """Later versions add fields; they are handed on."""
    assert transfer.unpack(transfer.pack(GOOD | {"new": 1}), 300, 32) == GOOD | {"new": 1}


@pytest.mark.parametrize(
    ("change", "prompt"),
    [
        pytest.param({"remote_block_ids": None}, 300, id="no blocks"),
        pytest.param({"remote_block_ids": []}, 300, id="no groups"),
        pytest.param({"remote_block_ids": [[]]}, 300, id="an empty group"),
        pytest.param({"remote_block_ids": [1, 2]}, 300, id="flat blocks"),
        pytest.param({"remote_block_ids": [list(range(9))]}, 300, id="too few blocks"),
        pytest.param({"remote_block_ids": [list(range(11))]}, 300, id="too many blocks"),
        pytest.param({"remote_engine_id": None}, 300, id="no engine"),
        pytest.param({"remote_port": "5600"}, 300, id="port as text"),
        pytest.param({"do_remote_prefill": False}, 300, id="not a pull"),
        pytest.param({"transfer_mode": "push"}, 300, id="push"),
        pytest.param({}, 301, id="a longer prompt"),
        pytest.param({}, 299, id="a shorter prompt"),
    ],
)
def test_bad_parameters_are_refused(change: dict[str, Any], prompt: int) -> None:
    """Each of these ended the engine, or gave wrong tokens, when vLLM got it."""
    with pytest.raises(transfer.TransferError):
        transfer.unpack(transfer.pack(GOOD | change), prompt, 32)


def test_a_missing_field_and_noise_are_refused() -> None:
    """As are bytes that are no parameters at all."""
    for name in transfer.FIELDS:
        with pytest.raises(transfer.TransferError, match=name):
            transfer.unpack(transfer.pack({key: value for key, value in GOOD.items() if key != name}), 300, 32)
    with pytest.raises(transfer.TransferError):
        transfer.unpack(b"\xc1", 300, 32)
