"""Tokenizing turn by turn, and from memory, changes no id."""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from workers.frontend.turns import Tokens, boundaries
from workers.runtime.wire import pack

CORPUS = ["the quick brown fox jumps over the lazy dog <a> </a> hello hello world  two  spaces\n\nlines"] * 3
PIECES = ["<|a|>", "<|b|>", "<|b", "|>", "<strip>", "<both|>", "one ", "the fox", " ", "\n", "é日", "<mask>", "w"]


def trained(kind: str) -> Tokenizer:
    """A small tokenizer of a family, with added tokens that may be cut at and some that may not."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "byte"))
    if kind == "byte":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "first":  # only what opens the text gets a space before it
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:  # as older Llama tokenizers do
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte" else []
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken("<|a|>", normalized=False), AddedToken("<|b|>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<strip>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<mask>", normalized=True), AddedToken("w", single_word=True, normalized=False)])
    return tokenizer


TOKENIZERS = {kind: trained(kind) for kind in ("byte", "first", "prepend")}
CACHED = {kind: Tokens(tokenizer, max_cached_bytes=3000) for kind, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=12))
def test_ids_are_those_of_the_whole_text(kind: str, pieces: list[str]) -> None:
    """Whatever stands around the added tokens, and whatever was tokenized before."""
    text = "".join(pieces)

    assert CACHED[kind].encode(text, special=False) == pack(TOKENIZERS[kind].encode(text, add_special_tokens=False).ids)


def test_threads_share_the_turns(tiny_model: Path) -> None:
    """Many at once, of few different turns: each gets its own ids."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    marks = boundaries(list(tokenizer.get_added_tokens_decoder().values()))
    texts = [marks[0].join(f"turn {number % modulus}" for modulus in range(1, 9)) for number in range(400)]
    tokens = Tokens(tokenizer, max_cached_bytes=3000)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: tokens.encode(text, special=False), texts))

    assert found == [pack(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]


@pytest.mark.parametrize(
    "turn", [pytest.param("{} w", id="short"), pytest.param("{} " + "\N{SNOWMAN}" * 300, id="of many tokens")]
)
def test_turns_take_no_more_memory_than_they_may(turn: str) -> None:
    """Text, ids and all, by Python's own count of what it has given out."""
    limit = 1 << 20
    tokens = Tokens(TOKENIZERS["byte"], max_cached_bytes=limit)
    tokens.encode(f"<|a|>{turn.format('warm')}", special=False)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(6000 if len(turn) < 10 else 1000):
            tokens.encode(f"<|a|>{turn.format(number)}", special=False)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert limit / 2 < held < 1.05 * limit


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        pytest.param(["<|a|>", "<|b|>"], ["<|a|>", "<|b|>"], id="apart"),
        pytest.param(["<a>", "x<a>"], [], id="one ends another"),
        pytest.param(["<a>", "><b>"], [], id="one begins where another ends"),
        pytest.param(["aba"], [], id="a letter first"),
        pytest.param(["<>", "|<>|", "<c>"], ["<c>"], id="one within another"),
        pytest.param(["<<", "<c|"], [], id="one with itself"),
    ],
)
def test_only_tokens_that_meet_no_other_are_cut_at(contents: list[str], expected: list[str]) -> None:
    """Where two could be read out of the same characters, what comes before decides which it is."""
    assert boundaries([AddedToken(content, normalized=False) for content in contents]) == expected
