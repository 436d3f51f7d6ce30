"""What a model's config.json says that a plan must respect; read without transformers, where the file is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError

# As vLLM 0.32 looks for them (transformers_utils/model_arch_config_convertor.py).
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model; None where its configuration does not say.

    `latent` models keep one KV cache for all heads (MLA); `cross` ones have an encoder whose output each layer looks at.
    """

    heads: int | None = None
    kv_heads: int | None = None
    layers: int | None = None
    experts: int = 0
    latent: bool = False
    cross: bool = False

    @property
    def moe(self) -> bool:
        """Whether layers have experts of which each token uses a few."""
        return self.experts > 0


def read_shape(path: Path) -> Shape | None:
    """The shape of the model in a folder, or None while there is no config.json.

    Raises:
        ConfigError: The file is no JSON object.
    """
    file = path / "config.json"
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): fetch the model again, or set model.path") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no JSON object: fetch the model again, or set model.path")
    return shape_of(content)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes; of multimodal models that of the language model."""
    text = config.get("text_config") or config.get("llm_config") or config
    heads = _number(text, "num_attention_heads", "n_head")
    kv_heads = _number(text, "num_key_value_heads")
    return Shape(
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        layers=_number(text, "num_hidden_layers", "n_layer"),
        experts=_experts(text),
        latent=bool(text.get("kv_lora_rank")),
        cross=config.get("is_encoder_decoder") is True,
    )


def _experts(text: Mapping[str, Any]) -> int:
    direct = _number(text, *EXPERTS)
    blocks = [block for block in text.get("block_configs") or () if isinstance(block, dict)]
    routed = [int(block.get("n_routed_experts") or 0) for block in blocks if block.get("block_type") == "moe"]
    return direct or max(routed, default=0)


def _number(text: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = text.get(name)
        if isinstance(value, list) and value:  # one for each layer: all the same where it matters
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
