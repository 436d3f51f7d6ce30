"""What makes the tiny model see images and video: a vision tower and processors, in the shape of Qwen2-VL.

Its positions depend on what it sees (M-RoPE), and its language model is Llama's but for a bias that is zero there, so that the
tiny model's own weights are used as they are. The video processor of transformers needs torchvision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.tiny_senses import Sense

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

PATCH_SIZE = 8
MERGE_SIZE = 2
FRAMES_A_PATCH = 2
CHANNELS = 3
UNIT = PATCH_SIZE * MERGE_SIZE  # a square of this edge is one token
MOST_PIXELS = 16 * UNIT**2
HIDDEN = 64
INNER = 2 * HIDDEN
LAYERS = 1
HEADS = 2

TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# Large, so that other pictures give other answers.
PIXEL_SPREAD = 4.0
PARTS = """\
{%- if content.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif content.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}{{ content.text }}{% endif %}"""


class Watching(Sense):
    """The parts that a text model is given beside its own."""

    tokens = TOKENS
    processor = "Qwen2VLProcessor"
    parts = PARTS
    hidden = HIDDEN

    def config(self, text: dict[str, Any]) -> dict[str, Any]:
        """config.json, from that of the text model."""
        half = text["head_dim"] // 2
        sections = [half // 4, half // 8 * 3, half // 8 * 3]  # of time, height and width
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        mine = {
            "model_type": "qwen2_vl_text",
            "vocab_size": self._text_vocab + len(TOKENS),
            "rope_parameters": {**text["rope_parameters"], "mrope_section": sections},
        }
        kept = {
            name: value for name, value in text.items() if name not in ("architectures", "attention_bias", "mlp_bias")
        }
        return {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "dtype": text["dtype"],
            "tie_word_embeddings": False,
            **{name: self._text_vocab + at for at, name in enumerate(names)},
            "text_config": {**kept, **mine},
            "vision_config": {
                "model_type": "qwen2_vl",
                "depth": LAYERS,
                "embed_dim": HIDDEN,
                "hidden_size": self._text_hidden,
                "hidden_act": "quick_gelu",
                "mlp_ratio": INNER // HIDDEN,
                "num_heads": HEADS,
                "in_channels": CHANNELS,
                "patch_size": PATCH_SIZE,
                "spatial_merge_size": MERGE_SIZE,
                "temporal_patch_size": FRAMES_A_PATCH,
            },
            **{name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """What turns an image or frames into patches of pixels, and into their tokens."""
        common = {
            "processor_class": "Qwen2VLProcessor",
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": FRAMES_A_PATCH,
            "merge_size": MERGE_SIZE,
            "size": {"shortest_edge": UNIT**2, "longest_edge": MOST_PIXELS},
            "image_mean": [0.5] * CHANNELS,
            "image_std": [0.5] * CHANNELS,
        }
        return {
            "preprocessor_config.json": {**common, "image_processor_type": "Qwen2VLImageProcessor"},
            "video_preprocessor_config.json": {**common, "video_processor_type": "Qwen2VLVideoProcessor"},
        }

    def weights(self, text: dict[str, Array]) -> dict[str, Array]:
        """Each tensor, under the name that Hugging Face's Qwen2-VL gives it; the text model's are those given."""
        found = {
            name: tensor for name, tensor in text.items() if not name.endswith("o_proj.bias")
        }  # zero, and not there
        found = self._with_tokens(found, "model.embed_tokens.weight", "lm_head.weight")
        found.update({f"visual.{name}": tensor for name, tensor in self._tower().items()})
        return found

    def _tower(self) -> dict[str, Array]:
        shape = (HIDDEN, CHANNELS, FRAMES_A_PATCH, PATCH_SIZE, PATCH_SIZE)
        pixels = self._matrix(HIDDEN, CHANNELS * FRAMES_A_PATCH * PATCH_SIZE**2, PIXEL_SPREAD)
        found = {"patch_embed.proj.weight": pixels.reshape(shape), **self._norm("merger.ln_q")}
        for index in range(LAYERS):
            block = f"blocks.{index}"
            found |= self._norm(f"{block}.norm1") | self._norm(f"{block}.norm2")
            found |= self._linear(f"{block}.attn.qkv", 3 * HIDDEN, HIDDEN)
            found |= self._linear(f"{block}.attn.proj", HIDDEN, HIDDEN)
            found |= self._linear(f"{block}.mlp.fc1", INNER, HIDDEN) | self._linear(f"{block}.mlp.fc2", HIDDEN, INNER)
        merged = HIDDEN * MERGE_SIZE**2
        found |= self._linear("merger.mlp.0", merged, merged)
        return found | self._linear("merger.mlp.2", self._text_hidden, merged, PIXEL_SPREAD)
