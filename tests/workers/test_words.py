"""Tokenizing from words that were seen before changes no id."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from workers.frontend.turns import Tokens
from workers.frontend.words import MAX_NEW, MAX_TEXT_CHARS, TEXTS_TAKEN_WHOLE, Words, cuts_at_spaces
from workers.runtime.wire import pack

CORPUS = [
    "the quick brown fox's jumps, over 12 lazy dogs;  it'll say (hello) hello world!\n\n  def main():\n\treturn 345678",
    "Größe naïve 日本語 テスト Ärger façade ½ × ² caseChange HTTPServer don't DON'T we'Ve",
] * 3
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
# As their tokenizer.json files have them.
EXPRESSIONS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
MARKS = [AddedToken("<|a|>", normalized=False), AddedToken("<mask>", lstrip=True, normalized=True)]


def trained(
    kind: str,
    added: list[AddedToken] = MARKS,
    prefix: bool = False,
    normalizer: normalizers.Normalizer | None = None,
    dropout: float | None = None,
) -> Tokenizer:
    """A small tokenizer with the expression of a family."""
    tokenizer = Tokenizer(models.BPE(dropout=dropout))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if kind != "gpt2":
        split = pre_tokenizers.Split(Regex(EXPRESSIONS.get(kind, kind)), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(added)
    return tokenizer


TOKENIZERS = {
    kind: trained(kind, normalizer=normalizers.NFC() if kind == "qwen" else None) for kind in ("gpt2", *EXPRESSIONS)
}
KNOWING = {kind: Tokens(tokenizer, max_cached_bytes=0) for kind, tokenizer in TOKENIZERS.items()}
PIECES = [
    *(
        "the",
        "fox's",
        "hello",
        "12",
        "345678",
        "don't",
        "'ll",
        "HTTPServer",
        "caseChange",
        "日本語",
        "é",
        "e\u0301",
        "\u0301",
    ),
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
        "\x1f",
        ".",
        ",",
        "!",
        "(",
        "/",
        "'",
        "<|a|>",
        "<mask>",
        "<",
    ),
]


def ids(tokenizer: Tokenizer, text: str) -> bytes:
    """What the tokenizer itself makes of the whole text."""
    return pack(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=24))
def test_ids_are_those_of_the_whole_text(kind: str, pieces: list[str]) -> None:
    """For the expressions of all families, with what was learned from all texts before."""
    text = "".join(pieces)

    assert KNOWING[kind].encode(text, special=False) == ids(TOKENIZERS[kind], text)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        *(pytest.param(tokenizer, True, id=kind) for kind, tokenizer in TOKENIZERS.items()),
        pytest.param(trained(r"\S+\s*"), False, id="words take the spaces after them"),
        pytest.param(trained("gpt2", prefix=True), False, id="a space before the text"),
        pytest.param(trained("gpt2", dropout=0.1), False, id="merges by chance"),
        pytest.param(trained("gpt2", normalizer=normalizers.Strip()), False, id="a normalizer that takes spaces"),
        pytest.param(trained("gpt2", [AddedToken("<b>", rstrip=True)]), False, id="takes the spaces after it"),
        pytest.param(trained("gpt2", [AddedToken("a b")]), False, id="a space within"),
        pytest.param(Tokenizer(models.WordLevel({"a": 0}, "a")), False, id="not BPE"),
        pytest.param(Tokenizer(models.BPE()), False, id="words are not told apart"),
    ],
)
def test_texts_are_cut_only_where_the_tokenizer_cuts_them(tokenizer: Tokenizer, expected: bool) -> None:
    """Anything that is not known to stop at spaces is tokenized whole."""
    assert cuts_at_spaces(tokenizer) is expected


def test_known_words_are_not_tokenized_again() -> None:
    """In whatever order they come; after a text with many new ones, of which a few are learned, the next ones are taken whole."""
    asked: list[list[str]] = []

    def encode(texts: list[str]) -> list[bytes]:
        asked.append(texts)
        return [text.encode() for text in texts]

    words = Words(encode)
    assert words.encode("one two three") == b"one two three"
    assert words.encode("one three two") == b"one three two"
    assert asked == [["one"], [" two"], [" three"]]

    asked.clear()
    many = " ".join(f"word{number}" for number in range(3 * MAX_NEW))
    assert words.encode(many) == many.encode()
    assert len(asked) == MAX_NEW + 1
    assert asked[-1] == [many]

    asked.clear()
    for _ in range(TEXTS_TAKEN_WHOLE + 1):
        assert words.encode("one two") == b"one two"
    assert asked == [["one two"]] * TEXTS_TAKEN_WHOLE

    asked.clear()
    long = "two" + " two" * MAX_TEXT_CHARS
    assert words.encode(long) == long.encode()
    assert asked == [[long]]


def test_threads_share_few_words() -> None:
    """Though what is kept is thrown away all the time, each text gets its own ids."""
    tokenizer = TOKENIZERS["gpt2"]
    texts = [" ".join(f"w{number % modulus}" for modulus in range(1, 12)) for number in range(400)]
    words = Words(lambda some: [pack(item.ids) for item in tokenizer.encode_batch_fast(some)], max_words=8)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(words.encode, texts)) == [ids(tokenizer, text) for text in texts]
