"""Model folders in the shape of real models, made on the spot: a machine without a network has no weights to load.

A folder has a config.json with the sizes of the real model and a tokenizer of our own in which every token is a word that
names its id (`w123`), so that the ids of an answer can be read from its text. Weights are not there: engines make them,
random for throughput (`load_format=dummy`) or such that answers depend on the whole prompt (`benchmarks.gpu.weights`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

END = "<|end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama model. `fp8` marks the checkpoint as one of FP8 weights with dynamic activation scales.

    With `experts` it is a Mixtral model instead: that many experts in each layer, two of them for each token.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 128256
    positions: int = 131072
    fp8: bool = False
    experts: int = 0

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of KV cache of one token: keys and values of all layers and KV heads."""
        return self.layers * 2 * self.kv_heads * self.head_dim * bytes_per_value


LLAMA_8B = Shape(name="llama-8b", layers=32, hidden=4096, inner=14336, heads=32, kv_heads=8, head_dim=128)
LLAMA_8B_SHALLOW = replace(LLAMA_8B, name="llama-8b-4layers", layers=4)
MIXTRAL_SHALLOW = Shape(
    name="mixtral-4layers", layers=4, hidden=2048, inner=2048, heads=16, kv_heads=8, head_dim=128, experts=16
)
LLAMA_70B = Shape(name="llama-70b", layers=80, hidden=8192, inner=28672, heads=64, kv_heads=8, head_dim=128)
LLAMA_70B_FP8 = replace(LLAMA_70B, name="llama-70b-fp8", fp8=True)
LLAMA_70B_HALF = replace(LLAMA_70B, name="llama-70b-40layers", layers=40)
SMALL = Shape(
    name="small", layers=3, hidden=128, inner=256, heads=4, kv_heads=2, head_dim=32, vocabulary=2048, positions=4096
)


def make(shape: Shape, folder: Path) -> Path:
    """Write the folder of a shape into `folder/<name>` and return it; an existing one is used as it is."""
    path = folder / shape.name
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        _write(path / "tokenizer.json", tokenizer(shape.vocabulary))
        _write(path / "tokenizer_config.json", tokenizer_config(shape))
        _write(path / "generation_config.json", {"do_sample": False, "eos_token_id": shape.vocabulary - 1})
        _write(path / "config.json", config(shape))  # the last one: with it the folder is whole
    return path


def config(shape: Shape) -> dict[str, Any]:
    """config.json: the keys of Llama 3.1's own, or of Mixtral's."""
    found: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": shape.vocabulary - 2,
        "eos_token_id": shape.vocabulary - 1,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.positions,
    }
    if shape.experts:
        found |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": shape.experts,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        }
    if shape.fp8:
        # vLLM 0.32 takes this for a checkpoint of FP8 weights, which its dummy loader fills as they are. Quantizing
        # while loading (quantization=fp8_per_tensor) would hold the bfloat16 weights first.
        found["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    return found


def word(token: int) -> str:
    """The text of a token, its leading space included."""
    return f" w{token}"


def tokenizer(vocabulary: int) -> dict[str, Any]:
    """tokenizer.json: a word for each id, cut before spaces and put together without anything between."""
    words = {word(token): token for token in range(vocabulary - 1)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocabulary - 1,
                "content": END,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithNext",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": words | {END: vocabulary - 1}, "unk_token": word(0)},
    }


def tokenizer_config(shape: Shape) -> dict[str, Any]:
    """tokenizer_config.json; the chat template is the plainest."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.positions,
        "eos_token": END,
        "unk_token": word(0),
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }


def ids(text: str) -> list[int]:
    """The token ids of an answer's text.

    Raises:
        ValueError: The text is not made of our words.
    """
    found = []
    for part in text.replace(END, f"{word(-1)}").split(" ")[1:]:
        if not part.startswith("w"):
            raise ValueError(f"{part!r} is no word of this tokenizer; the text begins {text[:80]!r}")
        found.append(int(part[1:]))
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")))
