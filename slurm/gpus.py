"""The GPUs of a node as nvidia-smi tells of them, and whether they are fit to serve; parsing is pure."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from launch.errors import LaunchError

QUERY = (
    *("index", "uuid", "name", "pci.bus_id", "memory.total", "memory.used"),
    *("ecc.errors.uncorrected.volatile.total", "mig.mode.current"),
)
QUERY_S = 15.0
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """A GPU as its driver sees it; `ecc_errors` are those that could not be corrected since the driver was loaded."""

    index: int
    uuid: str
    name: str
    bus: str
    memory_bytes: int
    used_bytes: int
    ecc_errors: int
    mig: bool


def query() -> tuple[tuple[GpuState, ...], str | None]:
    """The GPUs of this node that we may see, and the newest CUDA that its driver serves (`12.7`). Blocks up to `QUERY_S`.

    Raises:
        LaunchError: nvidia-smi is not there, or failed; brings what it said.
    """
    return parse(_run(f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits")), cuda_version(_run())


def parse(text: str) -> tuple[GpuState, ...]:
    """The answer to `QUERY` in CSV without header and units.

    Raises:
        LaunchError: A line is not of that form, as when a GPU has fallen off the bus.
    """
    found = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if not row:
            continue
        if len(row) != len(QUERY) or not row[0].isdigit():
            raise LaunchError(f"nvidia-smi says: {', '.join(row)}")
        index, uuid, name, bus, total, used, ecc, mig = row
        state = GpuState(
            index=int(index),
            uuid=uuid,
            name=name,
            bus=sysfs_bus(bus),
            memory_bytes=_number(total) * MIB,
            used_bytes=_number(used) * MIB,
            ecc_errors=_number(ecc),  # [N/A] where ECC is off
            mig=mig == "Enabled",
        )
        found.append(state)
    return tuple(found)


def cuda_version(text: str) -> str | None:
    """The `CUDA Version: 12.7` of nvidia-smi's page."""
    match = re.search(r"CUDA Version:\s*(\d+\.\d+)", text)
    return match[1] if match else None


def sysfs_bus(text: str) -> str:
    """`0000:1b:00.0` for nvidia-smi's `00000000:1B:00.0`."""
    domain, _, rest = text.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def given(states: Sequence[GpuState], visible: Sequence[str] | None) -> tuple[GpuState, ...]:
    """The GPUs that a rank was given, in the order of its slots: all, or those that CUDA_VISIBLE_DEVICES names."""
    if visible is None:
        return tuple(states)
    by_name = {str(state.index): state for state in states} | {state.uuid: state for state in states}
    return tuple(by_name[name.strip()] for name in visible if name.strip() in by_name)


def _run(*arguments: str) -> str:
    if shutil.which("nvidia-smi") is None:
        raise LaunchError("there is no nvidia-smi on this node")
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=QUERY_S, check=False)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"nvidia-smi did not answer within {QUERY_S:.0f} s") from None
    if done.returncode:
        raise LaunchError(f"nvidia-smi failed with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}")
    return done.stdout


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
