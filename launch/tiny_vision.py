"""What makes the tiny model see: a vision tower, a projection and an image processor, in the shape of Idefics3.

Chosen because vLLM 0.32 runs Idefics3 on the CPU without torchvision, and because its language model is Llama's, so that the
tiny model's own weights are used as they are. An image is cut into tiles, so that its size decides how many tokens it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from tokenizers import AddedToken

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
CHAT_TEMPLATE = """\
{{- '<|begin|>' }}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role: ' ~ message.role) }}
{%- endif %}
{{- '<|' ~ message.role ~ '|>\\n' }}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for content in message.content %}
{%- if content.type == 'image' %}{{ '<image>' }}{% else %}{{ content.text }}{% endif %}
{%- endfor %}
{%- endif %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


class Vision:
    """The parts that a text model is given beside its own.

    Args:
        matrix: Makes a random matrix `(rows, columns)` that keeps, or multiplies by its third argument, standard deviations.
        text_vocab: Tokens of the text model; those of images follow them.
        text_hidden: Width of the text model.
    """

    def __init__(self, matrix: Callable[..., Array], *, text_vocab: int, text_hidden: int) -> None:
        self._matrix = matrix
        self._text_vocab = text_vocab
        self._text_hidden = text_hidden
        self.tokenizer_config: dict[str, Any] = {
            "chat_template": CHAT_TEMPLATE,
            "processor_class": "Idefics3Processor",
            "additional_special_tokens": list(TOKENS),
        }

    def added_tokens(self) -> list[AddedToken]:
        """The tokens of images, in the order of their ids."""
        from tokenizers import AddedToken

        return [AddedToken(token, special=True, normalized=False) for token in TOKENS]

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
        import numpy

        found = {
            f"model.text_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
            for name, tensor in text.items()
        }
        embeddings, head = "model.text_model.embed_tokens.weight", "lm_head.weight"
        more = self._matrix(len(TOKENS), self._text_hidden, self._text_hidden**0.5)
        found[embeddings] = numpy.concatenate([found[embeddings], more])
        found[head] = numpy.concatenate([found[head], numpy.zeros_like(more)])  # never won, as the other specials
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

    def _linear(self, name: str, rows: int, columns: int) -> dict[str, Array]:
        import numpy

        bias = numpy.zeros(rows, dtype=numpy.float32)
        return {f"{name}.weight": self._matrix(rows, columns), f"{name}.bias": bias}

    def _norm(self, name: str) -> dict[str, Array]:
        import numpy

        return {
            f"{name}.weight": numpy.ones(HIDDEN, dtype=numpy.float32),
            f"{name}.bias": numpy.zeros(HIDDEN, dtype=numpy.float32),
        }
