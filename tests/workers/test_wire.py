"""What goes over the request plane comes out as it went in, and nothing else is taken for it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.runtime import wire

ids = st.lists(st.integers(0, 2**32 - 1))
numbers = st.integers(0, 2**40)
deltas = st.builds(wire.Delta, numbers, st.binary(), st.binary())
ends = st.builds(wire.End, numbers, st.text(), st.binary(), st.binary(), numbers, numbers, numbers)
steps = st.builds(wire.Step, st.lists(deltas), st.lists(ends))


@given(ids)
def test_token_ids_come_back(tokens: list[int]) -> None:
    """Four bytes each, so that their number is known without unpacking."""
    packed = wire.pack(tokens)

    assert wire.unpack(packed) == tokens
    assert len(packed) == 4 * len(tokens)


@given(steps)
def test_a_step_comes_back(step: wire.Step) -> None:
    """With all its deltas and ends."""
    assert wire.decode_to_frontend(wire.encode(step)) == step


@example(b"\x91\xa1\xff")
@example(wire.encode(wire.Cancel(1)).replace(b"\xa1c", b"\xa1\xff"))
@example(b"\x9a\xa1g\x01\xa5whole\xa1r\xc4\x00\xc4\x00\xc4\x00\x01" + b"\x91" * 100_000)
@given(st.binary())
def test_anything_else_is_a_decode_error(payload: bytes) -> None:
    """No other exception, and no message made up from noise that is not itself a message."""
    for decode in (wire.decode_to_worker, wire.decode_to_frontend):
        try:
            message = decode(payload)
        except msgspec.DecodeError:
            continue
        assert decode(wire.encode(message)) == message


def test_requests_and_results_are_told_apart() -> None:
    """A worker does not take a frontend's messages from another worker."""
    with pytest.raises(msgspec.DecodeError):
        wire.decode_to_worker(wire.encode(wire.Beat("i", 1, True, 1)))
