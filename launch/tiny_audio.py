"""What makes the tiny model hear: an audio encoder, a projection and a processor, in the shape of GLM-ASR.

Chosen because vLLM 0.32 runs GLM-ASR on the CPU without torchaudio, both in chats and for transcriptions, and because its
language model is Llama's, so that the tiny model's own weights are used as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.tiny_senses import Sense

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

SAMPLE_RATE = 16_000
WINDOW_S = 2
# Longer audio is cut off in a chat, and split for a transcription.
LONGEST_S = 8
MEL_BINS = 16
HIDDEN = 64
# The encoder's last step puts four frames of `HIDDEN` side by side, and takes their width for this one.
INNER = 4 * HIDDEN
LAYERS = 1
HEADS = 2
KERNEL = 3

AUDIO = "<|audio|>"
TOKENS = (AUDIO, "<|begin_of_audio|>", "<|end_of_audio|>")
# Large, so that other sounds give other answers.
SOUND_SPREAD = 4.0
PARTS = """\
{%- if content.type == 'audio' %}{{ '<|begin_of_audio|><|audio|><|end_of_audio|>' }}{% else %}{{ content.text }}{% endif %}"""


class Hearing(Sense):
    """The parts that a text model is given beside its own."""

    tokens = TOKENS
    processor = "GlmAsrProcessor"
    parts = PARTS
    hidden = HIDDEN

    def config(self, text: dict[str, Any]) -> dict[str, Any]:
        """config.json, from that of the text model."""
        specials = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {
            "architectures": ["GlmAsrForConditionalGeneration"],
            "model_type": "glmasr",
            "dtype": text["dtype"],
            "audio_token_id": self._text_vocab,
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "text_config": {**text, "vocab_size": self._text_vocab + len(TOKENS)},
            "audio_config": {
                "model_type": "glmasr_encoder",
                "hidden_size": HIDDEN,
                "intermediate_size": INNER,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_mel_bins": MEL_BINS,
                "max_position_embeddings": 1500,
                "hidden_act": "gelu",
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            },
            **specials,
        }

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """What turns sound into a spectrogram, and into its tokens."""
        extractor = {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": MEL_BINS,
            "sampling_rate": SAMPLE_RATE,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": WINDOW_S,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
        }
        return {
            "preprocessor_config.json": {"processor_class": "GlmAsrProcessor", **extractor},
            "processor_config.json": {
                "processor_class": "GlmAsrProcessor",
                "audio_token": AUDIO,
                "max_audio_len": LONGEST_S,
                "feature_extractor": extractor,
            },
        }

    def weights(self, text: dict[str, Array]) -> dict[str, Array]:
        """Each tensor, under the name that Hugging Face's GLM-ASR gives it; the text model's are those given."""
        found = {f"language_model.{name}": tensor for name, tensor in text.items()}
        found = self._with_tokens(found, "language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
        width = self._text_hidden
        found |= self._linear("multi_modal_projector.linear_1", 2 * width, INNER)
        found |= self._linear("multi_modal_projector.linear_2", width, 2 * width, SOUND_SPREAD)
        found.update({f"audio_tower.{name}": tensor for name, tensor in self._tower().items()})
        return found

    def _tower(self) -> dict[str, Array]:
        found = self._convolution("conv1", MEL_BINS, SOUND_SPREAD) | self._convolution("conv2", HIDDEN, 1.0)
        found |= self._norm("norm")
        for index in range(LAYERS):
            layer = f"layers.{index}"
            found |= self._norm(f"{layer}.input_layernorm") | self._norm(f"{layer}.post_attention_layernorm")
            for name in ("q_proj", "v_proj", "o_proj"):
                found |= self._linear(f"{layer}.self_attn.{name}", HIDDEN, HIDDEN)
            found[f"{layer}.self_attn.k_proj.weight"] = self._matrix(HIDDEN, HIDDEN)  # the one without a bias
            found |= self._linear(f"{layer}.mlp.fc1", INNER, HIDDEN) | self._linear(f"{layer}.mlp.fc2", HIDDEN, INNER)
        return found

    def _convolution(self, name: str, channels: int, spread: float) -> dict[str, Array]:
        import numpy

        weight = self._matrix(HIDDEN, channels * KERNEL, spread).reshape(HIDDEN, channels, KERNEL)
        return {f"{name}.weight": weight, f"{name}.bias": numpy.zeros(HIDDEN, dtype=numpy.float32)}
