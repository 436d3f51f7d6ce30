"""Python's collector of cycles in a process that serves: seldom, and not over what lives as long as the process."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator

# Python looks for cycles after every 700 new objects, which a few streams make in a millisecond; and each time that it looks at
# all of them, at those of an engine's or tokenizer's code too.
THRESHOLDS = (20_000, 20, 50)


def settle() -> None:
    """What was made until here stays; to be called once, before the first request."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


@contextlib.contextmanager
def for_good() -> Iterator[None]:
    """Nothing is looked for while the block makes what lives as long as the process (imports, above all), nor in it afterwards.

    vLLM and torch are a million objects, and Python looks at all of them again and again while they are imported: a fifth of
    the import's CPU time. A process that is forked afterwards looks at none of them, so it shares their memory instead of
    copying it: half of what an engine core's start cost.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        # What is frozen is not cleared away at the interpreter's end: C++ bindings would call it a leak, in so many lines
        # that they bury the error which ended the process.
        atexit.register(gc.unfreeze)
