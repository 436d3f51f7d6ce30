"""Which machine this is, and what its Slurm says of itself; parsing and choosing are pure."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import conf

ASK_S = 20.0
PARTITIONS = "--format=%P|%l|%D|%c|%m|%G|%f"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A kind of node of a partition; `time_min` None without a limit, `gres` as Slurm writes it."""

    name: str
    default: bool
    time_min: int | None
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    gpu_type: str | None
    features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """A cluster as its own commands describe it; `accounts` None where there is no accounting to ask."""

    version: str
    cluster: str
    partitions: tuple[Partition, ...]
    settings: Mapping[str, str]
    accounts: tuple[str, ...] | None


def profiles() -> dict[str, dict[str, Any]]:
    """What each shipped profile says under `cluster`, by name; read without composing it."""
    found = {}
    for path in sorted((Path(conf.__file__).parent / "cluster").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        found[path.stem] = content.get("cluster", content)
    return found


def detect(
    known: Mapping[str, Mapping[str, Any]], host: str, environ: Mapping[str, str], cluster: str | None
) -> str | None:
    """The profile of this machine: by what a login sets, by the host's name, or by Slurm's name of the cluster.

    Args:
        known: The profiles.
        host: This host's full name.
        environ: Its environment.
        cluster: Slurm's ClusterName, if there is a Slurm.
    """
    for name, profile in known.items():
        marks = profile.get("host_env") or {}
        if marks and all(environ.get(key) == value for key, value in marks.items()):
            return name
    for name, profile in known.items():
        if any(fnmatch.fnmatch(host, pattern) for pattern in profile.get("hosts") or ()):
            return name
    by_cluster = {name.replace("_", ""): name for name in known}
    return by_cluster.get(re.sub(r"[^a-z0-9]", "", (cluster or "").lower()))


def ask_slurm() -> Slurm | None:
    """Ask this machine's Slurm, or None where there is none that answers."""
    version, partitions = _run("sinfo", "--version"), _run("sinfo", "--noheader", PARTITIONS)
    config = _run("scontrol", "show", "config")
    if version is None or partitions is None or config is None:
        return None
    settings = parse_config(config)
    user = os.environ.get("USER", "")
    associations = _run("sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={user}", "format=account")
    accounts = None if associations is None else tuple(sorted(set(associations.split())))
    return Slurm(
        version=version.removeprefix("slurm").strip(),
        cluster=settings.get("ClusterName", ""),
        partitions=parse_partitions(partitions),
        settings=settings,
        accounts=accounts,
    )


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """The lines of `sinfo --noheader` in the format `PARTITIONS`."""
    found = []
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 7:
            continue
        name, limit, nodes, cpus, memory, gres, features = fields
        kind, gpus = parse_gres(gres)
        found.append(
            Partition(
                name=name.rstrip("*"),
                default=name.endswith("*"),
                time_min=parse_limit(limit),
                nodes=int(nodes),
                cpus=int(re.sub(r"\D", "", cpus) or 0),
                memory_mb=int(re.sub(r"\D", "", memory) or 0),
                gpus=gpus,
                gpu_type=kind,
                features=tuple(feature for feature in features.split(",") if feature not in ("", "(null)")),
            )
        )
    return tuple(found)


def parse_gres(text: str) -> tuple[str | None, int]:
    """Kind and number of GPUs in `gpu:a100:4(S:0-3),nvme:1`; without a kind `gpu:4`."""
    total, kind = 0, None
    for item in re.sub(r"\([^)]*\)", "", text).split(","):
        parts = item.split(":")
        if parts[0] == "gpu" and parts[-1].isdigit():
            total += int(parts[-1])
            kind = parts[1] if len(parts) == 3 else kind
    return kind, total


def parse_limit(text: str) -> int | None:
    """Minutes of `1-00:00:00`, `2:00:00` or `30:00`; None for `infinite`."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or (dash and not days.isdigit()):
        return None
    numbers = [int(part) for part in parts]
    if dash:  # days-hours, days-hours:minutes, ...
        numbers += [0] * (3 - len(numbers))
        return int(days) * 1440 + numbers[0] * 60 + numbers[1]
    hours, minutes = ([0, 0] + numbers)[-3:-1] if len(numbers) > 1 else (0, numbers[0])
    return hours * 60 + minutes


def parse_config(text: str) -> dict[str, str]:
    """The `Key = value` lines of `scontrol show config`."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def draft(name: str, slurm: Slurm, interfaces: Sequence[str]) -> str:
    """A profile for a machine that has none, from what its Slurm says; whoever uses it goes through it once.

    Args:
        name: What to call it.
        slurm: What its Slurm says.
        interfaces: Network interfaces of the login node with an address: those of compute nodes are mostly named alike.
    """
    best = max(slurm.partitions, key=lambda item: (item.gpus * item.nodes, item.default, item.nodes))
    hsn = sorted(item for item in interfaces if item.startswith("hsn"))
    ib = sorted(item for item in interfaces if item.startswith("ib"))
    kind = "cxi" if hsn else "ib" if ib else "any"
    limits = [item for item in slurm.partitions if item.time_min and (item.gpus or not best.gpus)]
    lines = [
        "# @package _global_",
        f"# {slurm.cluster}: drafted from sinfo and scontrol (Slurm {slurm.version}). Check what says `check`.",
        "cluster:",
        f"  name: {name}",
        f"  gpus_per_node: {best.gpus}" + (f"  # {best.gpu_type}" if best.gpu_type else ""),
        "  gpu_request: "
        + ("gres=gpu:{n}  # check: some sites want gpus-per-node={n}, or nothing" if best.gpus else "null"),
        f"  interface: {(hsn or ib or ['null'])[0]}  # check on a compute node",
        f"  fabric: {kind}  # check: ib, roce, cxi, ethernet",
    ]
    if kind == "cxi":
        lines.append(
            "  nixl_backends: [LIBFABRIC]  # UCX has no transport for Slingshot; see generic_slingshot for NCCL's"
        )
    if slurm.accounts:
        lines.append("  account_required: true  # check")
    if limits:
        lines.append("  limits:")
        rows = dict.fromkeys(f"    - {{partition: {item.name}, time_min: {item.time_min}}}" for item in limits)
        lines += rows
    lines += ["slurm:", f"  partition: {best.name}"]
    return "\n".join(lines) + "\n"


def _run(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
