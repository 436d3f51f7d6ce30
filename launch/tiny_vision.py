"""What makes the tiny model see: a vision tower, a projection and an image processor, in the shape of Idefics3.

Chosen because vLLM 0.32 runs Idefics3 on the CPU without torchvision, and because its language model is Llama's, so that the
tiny model's own weights are used as they are. An image is cut into tiles, so that its size decides how many tokens it takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.tiny_senses import Sense

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

IMAGE_SIZE = 32
PATCH_SIZE = 8
LONGEST_EDGE = 2 * IMAGE_SIZE
SCALE_FACTOR = 2
HIDDEN = 64
INNER = 128
LAYERS = 1
HEADS = 2
CHANNELS = 3
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
TILE_TOKENS = PATCHES // SCALE_FACTOR**2

IMAGE = "<image>"
# As Idefics3's processor names them; it would add those that are missing at the end of the vocabulary.
TOKENS = (IMAGE, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
# Large, so that images of other colours give other answers.
PIXEL_SPREAD = 4.0
PARTS = """\
{%- if content.type == 'image' %}{{ '<image>' }}{% else %}{{ content.text }}{% endif %}"""


class Vision(Sense):
    """The parts that a text model is given beside its own."""

    tokens = TOKENS
    processor = "Idefics3Processor"
    parts = PARTS
    hidden = HIDDEN

    def config(self, text: dict[str, Any]) -> dict[str, Any]:
        """config.json, from that of the text model."""
        specials = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "dtype": text["dtype"],
            "image_token_id": self._text_vocab,
            "scale_factor": SCALE_FACTOR,
            "tie_word_embeddings": False,
            "text_config": {**text, "vocab_size": self._text_vocab + len(TOKENS)},
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": HIDDEN,
                "intermediate_size": INNER,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_channels": CHANNELS,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "hidden_act": "gelu_pytorch_tanh",
                "layer_norm_eps": 1e-6,
                "attention_dropout": 0.0,
            },
            **specials,
        }

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """What turns an image into tiles of pixels, and into its tokens."""
        return {
            "preprocessor_config.json": {
                "image_processor_type": "Idefics3ImageProcessor",
                "do_convert_rgb": True,
                "do_resize": True,
                "size": {"longest_edge": LONGEST_EDGE},
                "do_image_splitting": True,
                "max_image_size": {"longest_edge": IMAGE_SIZE},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [0.5] * CHANNELS,
                "image_std": [0.5] * CHANNELS,
                "do_pad": True,
                "resample": 1,
            },
            "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": TILE_TOKENS},
        }

    def weights(self, text: dict[str, Array]) -> dict[str, Array]:
        """Each tensor, under the name that Hugging Face's Idefics3 gives it; the text model's are those given."""
        found = {
            f"model.text_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
            for name, tensor in text.items()
        }
        found = self._with_tokens(found, "model.text_model.embed_tokens.weight", "lm_head.weight")
        found["model.connector.modality_projection.proj.weight"] = self._matrix(
            self._text_hidden, HIDDEN * SCALE_FACTOR**2
        )
        found.update({f"model.vision_model.{name}": tensor for name, tensor in self._tower().items()})
        return found

    def _tower(self) -> dict[str, Array]:
        import numpy

        pixels = self._matrix(HIDDEN, CHANNELS * PATCH_SIZE**2, PIXEL_SPREAD)
        found = {
            "embeddings.patch_embedding.weight": pixels.reshape(HIDDEN, CHANNELS, PATCH_SIZE, PATCH_SIZE),
            "embeddings.patch_embedding.bias": numpy.zeros(HIDDEN, dtype=numpy.float32),
            "embeddings.position_embedding.weight": self._matrix(PATCHES, HIDDEN, HIDDEN**0.5),
            **self._norm("post_layernorm"),
        }
        for index in range(LAYERS):
            layer = f"encoder.layers.{index}"
            found |= self._norm(f"{layer}.layer_norm1") | self._norm(f"{layer}.layer_norm2")
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                found |= self._linear(f"{layer}.self_attn.{name}", HIDDEN, HIDDEN)
            found |= self._linear(f"{layer}.mlp.fc1", INNER, HIDDEN) | self._linear(f"{layer}.mlp.fc2", HIDDEN, INNER)
        return found
