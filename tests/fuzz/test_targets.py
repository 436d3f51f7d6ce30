"""What strangers can send, briefly; `python -m tests.fuzz` goes on for as long as one likes."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import BODY_LIMIT, TARGETS

# JSON that looks like a request: known names, and values of any kind.
NAMES = st.sampled_from(
    (
        "model",
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "max_tokens",
        "n",
        "seed",
        "input",
        "tools",
        "echo",
        "x",
    )
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("tiny"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.sampled_from(("role", "content")), inner),
    max_leaves=8,
)
BODIES = st.builds(lambda fields: json.dumps({"model": "tiny"} | fields).encode(), st.dictionaries(NAMES, VALUES))


@pytest.mark.parametrize("target", sorted(TARGETS))
@settings(max_examples=200)
@example(b"\x04" + gzip.compress(b"x" * 100 * BODY_LIMIT))
@example(b"\x0fPOST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello" * 20)
@given(st.binary(max_size=300) | st.builds(lambda kind, body: bytes([kind]) + body, st.integers(0, 4), BODIES))
def test_noise_breaks_no_promise(target: str, data: bytes) -> None:
    """Frames, connections and bodies: refused as they should be, or taken as what they are."""
    TARGETS[target](data)
