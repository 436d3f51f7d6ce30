"""LoRA adapters made by hand for the tiny model, in peft's files; good ones, and ones that are wrong in a single way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from launch.tiny_model import HEAD_DIM, HIDDEN, INNER, KV_HEADS, LAYERS

# (out, in) as in the model's own weights.
SIZES = {
    "q_proj": (HIDDEN, HIDDEN),
    "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
BLOCK = {"q_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn", "down_proj": "mlp"}


def make_adapter(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 8,
    modules: Iterable[str] = ("v_proj", "o_proj"),
    layers: Iterable[int] = range(LAYERS),
    sizes: Mapping[str, tuple[int, int]] = SIZES,
    config: Mapping[str, Any] = {},
) -> Path:
    """Write an adapter; strong enough that greedy text is another one."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for layer in layers:
        for module in modules:
            outer, inner = sizes.get(module, (HIDDEN, HIDDEN))
            name = f"base_model.model.model.layers.{layer}.{BLOCK.get(module, 'self_attn')}.{module}"
            tensors[f"{name}.lora_A.weight"] = random.normal(0, inner**-0.5, (rank, inner)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.normal(0, 1.0, (outer, rank)).astype(np.float32)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "somewhere/tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(modules),
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    # Written aside: vLLM on the CPU keeps the weights of a loaded adapter as a map of the file.
    aside = folder / "aside"
    aside.write_bytes(save(tensors))
    aside.replace(folder / "adapter_model.safetensors")
    return folder
