"""The files of a LoRA adapter, checked before an engine sees them.

An adapter comes from a folder that the recipe allows, symbolic links followed. Its configuration and the *header* of its
weights are read and compared with the model: vLLM 0.32 notices some of what is wrong with an adapter late, and some of it
never (weights that are too small are copied into a corner of the layer).
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from workers.engine.base import AdapterLimits
from workers.runtime.commands import OperationError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG_BYTES = 4 << 20
HEADER_BYTES = 100 << 20  # safetensors' own limit
# What peft can do and vLLM 0.32 cannot (vllm/lora/peft_helper.py), with the value that means it is not used.
UNSUPPORTED = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_bdlora": None,
    "use_qalora": False,
}
# base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight
TENSOR = re.compile(r"(?:.*\.)?(?P<module>[A-Za-z0-9_]+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
LAYER = re.compile(r"\.layers\.(\d+)\.")
# Sizes are those of the language model; towers of other modalities have modules of the same names.
TOWER = re.compile(r"vision|visual|audio|encoder|tower|projector")


@dataclass(frozen=True, slots=True)
class Checked:
    """An adapter that fits. `digest` is new whenever its files are."""

    rank: int
    digest: str


def folder_of(path: str | None, uri: str | None, allowed: Sequence[str]) -> Path:
    """The folder of an adapter, links followed; blocks.

    Raises:
        OperationError: 400, it is not named properly or not fetched from there; 403, it is not in an allowed folder.
    """
    if (path is None) == (uri is None):
        raise OperationError(
            400, "say where the adapter is with either path=/a/folder or uri=file:///a/folder, hf://org/name"
        )
    if uri is not None:
        parts = urlsplit(uri)
        if parts.scheme == "hf":
            return _cached(parts.netloc + parts.path, allowed)
        if parts.scheme != "file":
            raise OperationError(
                400,
                f"nothing here fetches {parts.scheme or 'such'}: addresses (compute nodes rarely reach them): copy the "
                "adapter into a folder of engine.lora_dirs and give its path",
            )
        if parts.netloc not in ("", "localhost"):
            raise OperationError(400, f"{uri} names another host: a path that all nodes share is file:///a/folder")
        path = unquote(parts.path)
    assert path is not None
    if not path.startswith("/") or "\0" in path:
        raise OperationError(400, f"path={path!r} is not an absolute path")
    if not allowed:
        raise OperationError(403, "the recipe allows no folder of adapters: launch with engine.lora_dirs=[/a/folder]")
    folder = _resolved(Path(path))
    _refuse_outside(folder, path, allowed)
    return folder


def check(folder: Path, limits: AdapterLimits, allowed: Sequence[str]) -> Checked:
    """Whether the adapter in the folder fits the engine; blocks.

    Raises:
        OperationError: 404, a file is missing; 403, a file is a link to outside; 400, says what does not fit.
    """
    config = _config(_file(folder, CONFIG, allowed))
    weights = _file(folder, WEIGHTS, allowed)
    rank = _rank(config, limits)
    _refuse_unsupported(config)
    header, raw = _header(weights)
    _check_tensors(header, config, limits)
    stat = weights.stat()
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + raw)
    digest.update(f"{weights} {stat.st_size} {stat.st_mtime_ns}".encode())
    return Checked(rank, digest.hexdigest())


def _cached(named: str, allowed: Sequence[str]) -> Path:
    """The snapshot of `org/name` or `org/name@revision` in an allowed folder that is a cache of the Hugging Face Hub.

    Nothing is fetched: compute nodes rarely reach the Hub, and a file that changes there must not change what is served.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:  # vLLM brings it
        raise OperationError(501, "hf:// addresses need the Python package huggingface_hub") from error
    repository, _, revision = named.partition("@")
    for folder in allowed:
        try:
            found = snapshot_download(repository, revision=revision or None, cache_dir=folder, local_files_only=True)
        except LocalEntryNotFoundError:
            continue
        except HFValidationError as error:
            raise OperationError(400, f"hf://{named} is no name of the Hugging Face Hub: {error}") from error
        snapshot = _resolved(Path(found))
        _refuse_outside(snapshot, f"hf://{named}", allowed)
        return snapshot
    raise OperationError(
        404,
        f"hf://{named} is in no cache of the Hugging Face Hub among engine.lora_dirs={list(allowed)}: where there is a "
        f"network, `hf download {repository} --cache-dir <one of them>`",
    )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise OperationError(400, f"{path} cannot be followed: {error}") from error


def _refuse_outside(real: Path, given: str | Path, allowed: Sequence[str]) -> None:
    if not any(real.is_relative_to(_resolved(Path(folder))) for folder in allowed):
        raise OperationError(
            403, f"{given} is not in a folder that the recipe allows (engine.lora_dirs={list(allowed)})"
        )


def _file(folder: Path, name: str, allowed: Sequence[str]) -> Path:
    if not folder.is_dir():
        raise OperationError(404, f"there is no folder {folder}")
    file = _resolved(folder / name)
    _refuse_outside(file, folder / name, allowed)
    if not file.is_file():
        found = ", ".join(sorted(item.name for item in folder.iterdir())[:10]) or "nothing"
        raise OperationError(404, f"{folder} has no {name} (it has {found}): save the adapter with peft as safetensors")
    return file


def _config(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > CONFIG_BYTES:
            raise OperationError(400, f"{file} is larger than {CONFIG_BYTES} bytes")
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise OperationError(400, f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise OperationError(400, f"{file} is not a JSON object")
    if config.get("peft_type", "LORA") != "LORA":
        raise OperationError(400, f"{file}: peft_type is {config['peft_type']!r}, only LORA is served")
    return config


def _rank(config: Mapping[str, Any], limits: AdapterLimits) -> int:
    pattern = config.get("rank_pattern") or {}
    given = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    ranks = [rank for rank in given if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0]
    if len(ranks) != len(given):
        raise OperationError(
            400, f"{CONFIG}: r={config.get('r')!r} and rank_pattern={pattern!r} must be numbers above 0"
        )
    rank = max(ranks)
    if rank > limits.rank:
        raise OperationError(
            400,
            f"the adapter has rank {rank}, the engine takes up to {limits.rank}: set engine.args.max_lora_rank={rank}",
        )
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise OperationError(400, f"{CONFIG}: lora_alpha is {alpha!r}, not a number")
    return rank


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if not isinstance(config.get("target_modules"), list | str):
        raise OperationError(400, f"{CONFIG}: target_modules is {config.get('target_modules')!r}, not a list of names")
    for name, unused in UNSUPPORTED.items():
        value = config.get(name)
        if value and value != unused:
            raise OperationError(400, f"{CONFIG}: {name}={value!r} is not supported by vLLM 0.32")
    others = [name for name in config.get("modules_to_save") or () if name not in ("classifier", "score")]
    if others:
        raise OperationError(400, f"{CONFIG}: modules_to_save={others} are not supported by vLLM 0.32")


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file: an 8-byte little-endian length, then JSON; the tensors fill the rest.

    https://github.com/huggingface/safetensors#format
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= HEADER_BYTES:
                raise OperationError(400, f"{file} is not a safetensors file")
            raw = opened.read(length)
        header = json.loads(raw)
        tensors = {name: item for name, item in header.items() if name != "__metadata__"}
        end = max((int(item["data_offsets"][1]) for item in tensors.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise OperationError(400, f"{file} is not a safetensors file: {type(error).__name__}: {error}") from error
    size = file.stat().st_size
    if size != 8 + length + end:
        raise OperationError(400, f"{file} has {size} bytes and should have {8 + length + end}: copy it again")
    return tensors, raw


def _check_tensors(header: Mapping[str, Any], config: Mapping[str, Any], limits: AdapterLimits) -> None:
    compared = 0
    sides: dict[str, set[str]] = {}
    for name, item in header.items():
        found = TENSOR.fullmatch(name)
        if found is None:
            if "lora_" in name or not limits.complete:
                continue  # embeddings, experts and classification heads have forms of their own: vLLM's to judge
            raise OperationError(400, f"{WEIGHTS}: {name} is no part of a LoRA adapter of this model")
        module, side = found["module"], found["side"]
        sides.setdefault(name.replace(f"lora_{side}", "lora_?"), set()).add(side)
        if TOWER.search(name):
            continue
        if module not in limits.modules:
            if limits.complete:
                known = ", ".join(sorted(limits.modules))
                raise OperationError(400, f"{WEIGHTS}: the model has no module {module!r} for {name}: it has {known}")
            continue
        layer = LAYER.search(name)
        if layer and int(layer[1]) >= limits.layers:
            raise OperationError(
                400, f"{WEIGHTS}: {name} is for layer {layer[1]} of a model with {limits.layers} layers"
            )
        compared += _compare(name, side, item.get("shape"), limits.modules[module], limits.rank)
    if not sides:
        raise OperationError(400, f"{WEIGHTS} has no lora_A or lora_B: it is no LoRA adapter")
    lonely = [name for name, found in sides.items() if found != {"A", "B"}]
    if lonely:
        raise OperationError(400, f"{WEIGHTS}: {lonely[0]} has only one of lora_A and lora_B")
    base = str(config.get("base_model_name_or_path") or "")
    if not compared and base.rstrip("/").rpartition("/")[2] not in limits.models:
        raise OperationError(
            400, f"the adapter was made for {base or 'an unknown model'!r}, not for {limits.models[0]!r}"
        )


def _compare(name: str, side: str, shape: Any, size: tuple[int | None, int | None], rank: int) -> int:
    """Compare one tensor with its layer: lora_A is (rank, in), lora_B is (out, rank). Returns how much was compared."""
    if not isinstance(shape, list) or len(shape) != 2:
        raise OperationError(400, f"{WEIGHTS}: {name} has shape {shape}, not two dimensions")
    inner, outer = (shape[0], shape[1]) if side == "A" else (shape[1], shape[0])
    if not 1 <= inner <= rank:
        raise OperationError(400, f"{WEIGHTS}: {name} has shape {shape}, which is no rank of 1 to {rank}")
    wanted = size[0] if side == "A" else size[1]
    if wanted is not None and outer != wanted:
        raise OperationError(
            400, f"{WEIGHTS}: {name} has shape {shape} for a layer of size {wanted}: the adapter is for another model"
        )
    return int(wanted is not None)
