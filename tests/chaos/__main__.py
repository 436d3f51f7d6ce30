"""`python -m tests.chaos --minutes N --seed S`: break a deployment for that long, and print what came of it.

Exits with 1 if any request was answered wrongly, lost or stuck, if the deployment did not come back, or if something leaked.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from launch.tiny_model import make_tiny_model
from tests.chaos.storm import ECHO, VLLM, storm


def main() -> int:
    """Storm, and tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Random faults under a checked load.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--vllm", action="store_true", help="tiny engines of vLLM on the CPU instead of echoes")
    parser.add_argument(
        "--keep", type=Path, help="folder for the run directory and the logs; by default they are deleted"
    )
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="storm-") as scratch:
        folder = given.keep or Path(scratch)
        model = make_tiny_model(folder / "model")
        report = storm(folder / "deployment", model, given.minutes, given.seed, VLLM if given.vllm else ECHO)
    print(report.table())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
