"""What the tiny models that see, hear or watch share: how a text model is given more tokens, and a tower of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from tokenizers import AddedToken

    Array = npt.NDArray[np.float32]

CHAT_TEMPLATE = """\
{{- '<|begin|>' }}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role: ' ~ message.role) }}
{%- endif %}
{{- '<|' ~ message.role ~ '|>\\n' }}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for content in message.content %}
PARTS
{%- endfor %}
{%- endif %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""


class Sense:
    """The parts that a text model is given beside its own.

    Args:
        matrix: Makes a random matrix `(rows, columns)` that keeps, or multiplies by its third argument, standard deviations.
        text_vocab: Tokens of the text model; those of the medium follow them.
        text_hidden: Width of the text model.
    """

    tokens: ClassVar[Sequence[str]]
    """The tokens of the medium, in the order of their ids."""
    processor: ClassVar[str]
    """Class of its processor."""
    parts: ClassVar[str]
    """What the chat template makes of `content`, one part of a message."""
    hidden: ClassVar[int]
    """Width of its tower."""

    def __init__(self, matrix: Callable[..., Array], *, text_vocab: int, text_hidden: int) -> None:
        self._matrix = matrix
        self._text_vocab = text_vocab
        self._text_hidden = text_hidden
        self.tokenizer_config: dict[str, Any] = {
            "chat_template": CHAT_TEMPLATE.replace("PARTS", self.parts),
            "processor_class": self.processor,
            "additional_special_tokens": list(self.tokens),
        }

    def added_tokens(self) -> list[AddedToken]:
        """The tokens of the medium, in the order of their ids."""
        from tokenizers import AddedToken

        return [AddedToken(token, special=True, normalized=False) for token in self.tokens]

    def _with_tokens(self, found: dict[str, Array], embeddings: str, head: str) -> dict[str, Array]:
        """The tensors with rows for the tokens of the medium; as the other specials they are never won."""
        import numpy

        more = self._matrix(len(self.tokens), self._text_hidden, self._text_hidden**0.5)
        rows = {embeddings: more, head: numpy.zeros_like(more)}
        return found | {name: numpy.concatenate([found[name], added]) for name, added in rows.items()}

    def _linear(self, name: str, rows: int, columns: int, spread: float = 1.0) -> dict[str, Array]:
        import numpy

        bias = numpy.zeros(rows, dtype=numpy.float32)
        return {f"{name}.weight": self._matrix(rows, columns, spread), f"{name}.bias": bias}

    def _norm(self, name: str) -> dict[str, Array]:
        import numpy

        return {
            f"{name}.weight": numpy.ones(self.hidden, dtype=numpy.float32),
            f"{name}.bias": numpy.zeros(self.hidden, dtype=numpy.float32),
        }
