"""What strangers can send, briefly; `python -m tests.fuzz` goes on for as long as one likes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import SEEDS, TARGETS

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


NOISE = st.binary(max_size=300) | st.builds(lambda kind, body: bytes([kind]) + body, st.integers(0, 4), BODIES)
SPOTS = st.lists(st.tuples(st.integers(0), st.binary(max_size=3)), max_size=4)


@pytest.mark.parametrize("target", ["frames", "bodies"])  # tests/workers/test_http.py has connections
@settings(max_examples=50)
@given(NOISE)
def test_noise_breaks_no_promise(target: str, data: bytes) -> None:
    """Refused as it should be, or taken as what it is."""
    TARGETS[target](data)


@pytest.mark.parametrize("target", sorted(TARGETS))
@settings(max_examples=50)
@given(st.data())
def test_damage_breaks_no_promise(target: str, data: st.DataObject) -> None:
    """What would have been good, changed in a few places."""
    damaged = data.draw(st.sampled_from(SEEDS[target]))
    TARGETS[target](damaged)
    for spot, patch in data.draw(SPOTS):
        place = spot % (len(damaged) + 1)
        damaged = damaged[:place] + patch + damaged[place + len(patch) :]
    TARGETS[target](damaged)
