"""Logging of a process of ours: to standard output, which its agent or Slurm keeps in a file; the name is bound once."""

from __future__ import annotations

import logging
import sys


def set_up_logging(name: str, level: int = logging.INFO) -> None:
    """Lines of time, level, process name and message."""
    logging.basicConfig(
        stream=sys.stdout,
        level=level,
        format=f"%(asctime)s %(levelname)s {name}: %(message)s",
        force=True,
    )
