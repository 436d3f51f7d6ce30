"""Weights made while an engine starts, from names and a seed: `engine.args.load_format=made`.

vLLM's own dummy weights are so small that attention adds nothing that bfloat16 can hold: such a model answers by its last
token alone, and an answer says nothing of the KV cache. These are scaled so that every layer's attention looks at a few
tokens of the prompt and matters. They are made as a whole checkpoint would be read, by name, so that each way of cutting
them over GPUs gives the same model.

vLLM loads a module for this in every process of an engine by the entry point that `install` writes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

FORMAT = "made"
GROUP = "vllm.general_plugins"
PLUGIN = "baton_made_weights"
# Queries are this many times larger than usual, so that attention is on a few tokens and not on the mean of all.
QUERY_GAIN = 4.0


def install(folder: Path) -> Path:
    """Write the entry point into a folder that then belongs on PYTHONPATH, and return the folder."""
    lines = [f"{PLUGIN} = benchmarks.gpu.weights:register"]
    if "baton_orphan_guard" not in {point.name for point in entry_points(group=GROUP)}:
        # Baton runs from its sources here: without the guard a killed member leaves its engine on the GPU.
        lines.append("baton_orphan_guard = workers.engine.orphans:guard")
    info = folder / f"{PLUGIN}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "\n".join(lines) + "\n")
    return folder


def register() -> None:
    """vLLM's entry point: make the load format known. vLLM calls it again in every process, and more than once."""
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if FORMAT in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        return

    class MadeWeights(BaseModelLoader):  # type: ignore[misc]  # mypy does not follow vLLM here
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            device = next(model.parameters()).device
            model.load_weights(tensors(model_config.hf_config, model_config.dtype, device))

    model_loader.register_model_loader(FORMAT)(MadeWeights)


def tensors(config: Any, dtype: Any, device: Any) -> Iterator[tuple[str, Any]]:
    """A Llama or Mixtral checkpoint: names as on Hugging Face, whole tensors of `dtype`, made on `device`.

    The same name gives the same values on every device of one type.
    """
    import torch

    for name, shape in names(config):
        if len(shape) == 1:  # the weights of a norm
            yield name, torch.ones(shape, dtype=dtype, device=device)
            continue
        generator = torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()))
        scale = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
        if "q_proj" in name:
            scale *= QUERY_GAIN
        # In float32 whatever the dtype, so that both precisions are the same model.
        made = torch.randn(shape, generator=generator, dtype=torch.float32, device=device) * scale
        yield name, made.to(dtype)


def names(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape `(out, in)` of every tensor of a Llama checkpoint, or of a Mixtral one."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (heads, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_heads, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_heads, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        experts = getattr(config, "num_local_experts", 0)
        if experts:
            yield f"{prefix}.block_sparse_moe.gate.weight", (experts, hidden)
        for expert in range(experts):
            yield f"{prefix}.block_sparse_moe.experts.{expert}.w1.weight", (inner, hidden)
            yield f"{prefix}.block_sparse_moe.experts.{expert}.w3.weight", (inner, hidden)
            yield f"{prefix}.block_sparse_moe.experts.{expert}.w2.weight", (hidden, inner)
        if not experts:
            yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)
