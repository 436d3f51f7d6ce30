"""`python -m benchmarks.weights.mpi_node MODEL RATE_MB`: what mpiexec starts on each node of the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.weights.__main__ import mpi_node

if __name__ == "__main__":
    mpi_node(Path(sys.argv[1]), float(sys.argv[2]))
