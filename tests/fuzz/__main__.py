"""`python -m tests.fuzz TARGET --seconds N`: feed a target noise that coverage guides; ends with 1 at the first broken promise.

Needs atheris (`pip install atheris`), which is not among the project's requirements. An input that breaks a promise is
written to `crash-...` in the working directory; `--input FILE` runs it again, and needs no atheris.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Fuzz, or run one input."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Noise for what strangers can send.")
    parser.add_argument("target", choices=("frames", "http", "bodies"))
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--input", type=Path, help="run this one input, and print what it breaks")
    given = parser.parse_args()
    if given.input:
        from tests.fuzz.targets import TARGETS

        TARGETS[given.target](given.input.read_bytes())
        return 0
    import atheris  # type: ignore[import-untyped]  # no requirement of the project

    with atheris.instrument_imports(include=["workers", "tests.fuzz"]):
        from tests.fuzz.targets import SEEDS, TARGETS

    with tempfile.TemporaryDirectory(prefix="fuzz-") as corpus:
        for number, seed in enumerate(SEEDS[given.target]):
            (Path(corpus) / str(number)).write_bytes(seed)
        options = [f"-max_total_time={given.seconds}", "-max_len=4096", "-timeout=20"]
        atheris.Setup([sys.argv[0], *options, corpus], TARGETS[given.target])
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
