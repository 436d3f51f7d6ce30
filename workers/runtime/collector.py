"""Python's collector of cycles in a process that serves: seldom, and not over what lives as long as the process."""

from __future__ import annotations

import gc

# Python looks for cycles after every 700 new objects, which a few streams make in a millisecond; and each time that it looks at
# all of them, at those of an engine's or tokenizer's code too.
THRESHOLDS = (20_000, 20, 50)


def settle() -> None:
    """What was made until here stays; to be called once, before the first request."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
