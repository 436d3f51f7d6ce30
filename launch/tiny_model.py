"""A tiny Llama-shaped model folder for tests, made in about a second without the network; on request one that sees or hears.

The weights are random but scaled so that greedy text is varied, depends on the whole prompt and has clear
winners at each step. The tokenizer is a byte-level BPE, so every UTF-8 text survives encode and decode.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.recipe import Tiny

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from tokenizers import Tokenizer

    from launch.tiny_audio import Hearing
    from launch.tiny_video import Watching
    from launch.tiny_vision import Vision

    Array = npt.NDArray[np.float32]

VOCAB = 2048
HIDDEN = 256
INNER = 512
LAYERS = 3
HEADS = 4
KV_HEADS = 2
HEAD_DIM = HIDDEN // HEADS
ROPE_THETA = 10000.0
MAX_POSITIONS = 4096

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SPECIALS = (PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|spare|>")
# Added tokens that are text, as reasoning models have them: vLLM's parsers look for them in the vocabulary.
MARKS = ("<think>", "</think>")

STAMP = "tiny_model.stamp.json"
SHARED_PARTS = "tiny_senses.py"
# The module beside this one that makes the further parts of each kind, and what shifts the seed of their random numbers.
PARTS = {
    Tiny.VISION: ("tiny_vision.py", 1 << 32),
    Tiny.AUDIO: ("tiny_audio.py", 1 << 33),
    Tiny.VIDEO: ("tiny_video.py", 1 << 34),
}

# Found by trial, so that greedy text is varied, never loops, and follows each token of the prompt.
# Per head: how uneven its attention is. The first two heads pick tokens anywhere in the prompt; the last two
# look a fixed number of tokens back (`LOOK_BACK`, per layer), for without a clear memory of the last few
# tokens a prompt such as "hello hello hello" sends greedy text into a loop.
HEAD_SPREAD = (2.5, 2.5, 0.5, 0.5)
QUERY_PULL = (0.0, 0.0, 10.0, 10.0)
KEY_PULL = 2.5
LOOK_BACK = ((0, 0, 1, 2), (0, 0, 1, 3), (0, 0, 1, 4))
PULL_PAIRS = 8
ATTENTION_GAIN = 3.0
MLP_GAIN = 3.0
# Large, so that the best token wins by far more than float32 rounding. Sampling at temperature 1 is
# therefore close to greedy.
LOGIT_SPREAD = 40.0

CHAT_TEMPLATE = """\
{{- '<|begin|>' }}
{%- if tools %}
{{- '<|system|>\\nTools:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- '<|end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('unknown role: ' ~ message.role) }}
{%- endif %}
{{- '<|' ~ message.role ~ '|>\\n' }}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' }}{{ call.function | tojson }}{{ '</tool_call>' }}
{%- endfor %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

PROSE = """\
The old harbour wakes before the sun does. Fishing boats knock against the wooden quay, gulls argue over scraps,
and somebody in a yellow coat is already sweeping snow from the steps of the bakery. A kettle whistles upstairs.
"You are late again," says the baker, although nobody is late and everyone knows it. The bread is warm, the coffee
is strong, and for a quarter of an hour there is nothing else worth talking about. Then the ferry arrives with its
post, its tourists, three bicycles, a piano and a very small dog that has never been to sea before.
How does a computer answer a question? First the words are cut into pieces, every piece becomes a number, and each
number becomes a long list of other numbers. Layer after layer mixes those lists, looks back at what came earlier,
and finally guesses which piece should follow. It repeats this hundreds of times per second. When many people ask at
once the machine groups their requests into batches, keeps notes about shared beginnings in a cache, and hands the
notes from one worker to another so that no work is done twice. If a worker fails, the scheduler notices, moves the
unfinished requests somewhere else, and tries again. Nobody reading the reply should be able to tell.
Please write a short summary of the following report. Explain why the result changed between Monday and Friday, list
the three largest differences, and suggest what we could measure next. Keep the tone friendly; avoid jargon.
In 1997 there were 12,480 visitors; in 2026 about 365,000. That is 29.2 times more, or roughly 12% growth per year.
Mountains, rivers, forests, deserts and islands all leave marks on the language of those who live near them.
def add(left: int, right: int = 0) -> int:
    if left is None or right < 0:
        raise ValueError("bad input")
    return left + right
for index, value in enumerate(items): print(f"{index}: {value}")
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius", "days": [1, 2, 3], "ok": true, "x": null}}
SELECT id, name FROM users WHERE age >= 18 AND city = 'Berlin' ORDER BY name LIMIT 10;
https://example.com/v1/chat/completions?stream=true&model=tiny#top
Über den Fluss führt eine schöne, schmale Brücke. L'été dernier, nous avons mangé près de la forêt. ¿Qué hora es?
Быстрая лиса прыгает через ленивую собаку. 今天天气很好。 我们去公园散步吧。こんにちは世界。
안녕하세요 세계. שלום مرحبا 🙂🚀
"""

STEMS = """\
accept act add adjust admit agree allow answer appear apply ask attach balance bend blend boil borrow bounce bound
brush build burn call camp carry cast chart check claim clean clear climb collect colour compute connect consider
control cook copy count cover craft cross dance deal deliver depend design detect direct discover doubt draft draw
dream drift drop earn edit empty enter explain export extend fail farm fetch fill filter find finish fix float flow
fold follow form frame gather glow grant group grow guard guess guide hand harvest help hold hunt import inform
insert inspect invent iron join jump keep knit know land laugh launch lead learn lend light link listen load lock
look loop mark match measure mend merge mix model mount need note number obtain offer open order own pack paint part
pass plan plant play point pour predict press print protect pull push quest quick rain reach read record reform
relax rent repeat report rest return ring roll round sail sample scan search seed select send shape shift sing sketch
sleep slow smooth soft solve sort sound spell spin split spread stamp start stay steam step stir stream strong
suggest support swim talk teach test thank think tight touch trace track trade train transform travel treat trust
turn twist type understand unfold visit wait walk warm wash watch water weight whisper wild wind wonder work wrap
write yield zoom"""

ENDINGS = ("", "s", "ed", "ing", "er", "able", "ment", "ful")


def make_tiny_model(folder: Path, *, kind: Tiny = Tiny.TEXT, seed: int = 0) -> Path:
    """Make `folder` hold the tiny model of this kind and seed, and return it.

    The kinds that see and hear are the one that reads, with a tower beside it (`launch.tiny_vision`, `tiny_audio`, `tiny_video`).

    The same modules, kind and seed give the same bytes on each run. Nothing is written when the folder already holds
    exactly this model. The folder appears whole or not at all, whoever else calls this at the same time.
    A folder with other people's files in it is refused with FileExistsError and left alone.
    """
    folder = Path(os.path.abspath(folder))
    if _holds(folder, kind, seed):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if not _holds(folder, kind, seed):
            _refuse_foreign(folder)
            _replace(folder, kind, seed)
    return folder


def main() -> None:
    """Command line: make the model in the folder named there and print the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", type=Tiny, default=Tiny.TEXT, choices=list(Tiny))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_tiny_model(arguments.folder, kind=arguments.kind, seed=arguments.seed))


# --- the folder ---


def _recipe(kind: Tiny, seed: int) -> dict[str, Any]:
    """What makes two models equal: the sources, the kind and the seed."""
    more = (PARTS[kind][0], SHARED_PARTS) if kind in PARTS else ()
    sources = [Path(__file__), *(Path(__file__).with_name(name) for name in more)]
    return {"sources": [_digest(path) for path in sources], "kind": str(kind), "seed": seed}


def _holds(folder: Path, kind: Tiny, seed: int) -> bool:
    """Whether the folder holds exactly the model of this kind and seed, each file's bytes included."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        recipe, files = stamp["recipe"], stamp["files"]
        return recipe == _recipe(kind, seed) and all(_digest(folder / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    """The file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the only right to change this folder; the kernel drops it when the process dies."""
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refuse_foreign(folder: Path) -> None:
    """Raise FileExistsError when replacing the folder would destroy something this module did not make."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} is not a plain folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STAMP).is_file():
        raise FileExistsError(f"{folder} holds files that are not a tiny model")


def _replace(folder: Path, kind: Tiny, seed: int) -> None:
    """Write the model aside, then put it in the folder's place. Needs the lock."""
    prefix = f".{folder.name}.aside-"
    for path in folder.parent.iterdir():
        if path.name.startswith(prefix):
            shutil.rmtree(path, ignore_errors=True)  # left by a run that was killed
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        new = aside / "new"
        new.mkdir()
        _write(new, kind, seed)
        if folder.exists():
            folder.rename(aside / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(folder: Path, kind: Tiny, seed: int) -> None:
    """Write each file of the model, the stamp last."""
    from safetensors.numpy import save

    tokenizer = _tokenizer()
    weights, config, tokenizer_config = _weights(seed, _speakable(tokenizer)), _config(), _tokenizer_config()
    if kind in PARTS:
        tower = _tower(kind, seed)
        tokenizer.add_tokens(tower.added_tokens())
        weights, config = tower.weights(weights), tower.config(config)
        tokenizer_config |= tower.tokenizer_config
        for name, content in tower.processor_files().items():
            _write_json(folder / name, content)
    # Not save_file: it makes a file that only its owner may read.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config())
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    _write_json(folder / STAMP, {"recipe": _recipe(kind, seed), "files": files})


def _tower(kind: Tiny, seed: int) -> Vision | Hearing | Watching:
    """What sees or hears, with a stream of numbers of its own: the language model is the same with it and without."""
    from launch.tiny_audio import Hearing
    from launch.tiny_video import Watching
    from launch.tiny_vision import Vision

    kinds: dict[Tiny, type[Vision | Hearing | Watching]]
    kinds = {Tiny.VISION: Vision, Tiny.AUDIO: Hearing, Tiny.VIDEO: Watching}
    made = kinds[kind]
    return made(_Noise(seed + PARTS[kind][1]).matrix, text_vocab=VOCAB, text_hidden=HIDDEN)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write the value as readable JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the configuration ---


def _special_ids() -> dict[str, int]:
    """The ids of the begin, end and pad tokens, under the names that the configuration files use."""
    names = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    return {key: SPECIALS.index(token) for key, token in names.items()}


def _config() -> dict[str, Any]:
    """config.json: the shape of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        **_special_ids(),
    }


def _generation_config() -> dict[str, Any]:
    """generation_config.json: greedy, so that no request gets sampling that it did not ask for."""
    return {"do_sample": False, **_special_ids()}


def _tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json: names of the special tokens, and the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


# --- the tokenizer ---


def _tokenizer() -> Tokenizer:
    """A byte-level BPE of exactly VOCAB tokens: the specials first, then the 256 bytes, then the merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKS),
        min_frequency=1,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    if tokenizer.get_vocab_size() != VOCAB:
        raise RuntimeError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {VOCAB}")
    begin = SPECIALS.index(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, begin)]
    )
    return tokenizer


def _corpus() -> Iterator[str]:
    """The text that the tokenizer learns: the prose, and each stem with each ending."""
    # Prose counts more, so that ordinary text gets whole words and made-up words fill up the rest.
    for _ in range(4):
        yield from PROSE.splitlines(keepends=True)
    for stem in STEMS.split():
        yield "".join(f" {stem}{ending}" for ending in ENDINGS)


def _speakable(tokenizer: Tokenizer) -> list[int]:
    """The tokens that may win a greedy step: those that are printable text by themselves."""
    return [token for token in range(len(SPECIALS), VOCAB - len(MARKS)) if _is_text(tokenizer.decode([token]))]


def _is_text(text: str) -> bool:
    """Whether the text is printable, spaces and newlines included, and no broken piece of a character."""
    return bool(text) and "\N{REPLACEMENT CHARACTER}" not in text and text.replace("\n", " ").isprintable()


# --- the weights ---


class _Noise:
    """Random matrices that are the same on each machine and numpy version.

    Only PCG64's raw stream is used: numpy promises that to stay, and its normal distribution not.
    """

    def __init__(self, seed: int) -> None:
        import numpy

        self._numpy = numpy
        self._bits = numpy.random.PCG64(seed)

    def matrix(self, rows: int, columns: int, spread: float = 1.0) -> Array:
        """A matrix that gives outputs of this standard deviation for inputs of standard deviation 1."""
        numpy = self._numpy
        raw = self._bits.random_raw(rows * columns) >> numpy.uint64(40)
        uniform = raw.astype(numpy.float64) / 2.0**23 - 1.0
        scaled: Array = (uniform * (spread * (3.0 / columns) ** 0.5)).astype(numpy.float32)
        return scaled.reshape(rows, columns)


def _weights(seed: int, speakable: list[int]) -> dict[str, Array]:
    """Each tensor of the model, under the name that Hugging Face's Llama gives it."""
    import numpy

    noise = _Noise(seed)
    head = noise.matrix(VOCAB, HIDDEN, LOGIT_SPREAD)
    # Special tokens and broken characters get logit 0: far below any winner, so greedy text stays
    # readable and does not end by itself, yet ordinary for a grammar that leaves no other choice.
    silent = numpy.ones(VOCAB, dtype=bool)
    silent[speakable] = False
    head[silent] = 0.0
    weights = {
        "lm_head.weight": head,
        "model.embed_tokens.weight": noise.matrix(VOCAB, HIDDEN, HIDDEN**0.5),
        "model.norm.weight": numpy.ones(HIDDEN, dtype=numpy.float32),
    }
    for index in range(LAYERS):
        layer = _layer(noise, index)
        weights.update({f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()})
    return weights


def _pull(back: int, amount: float) -> Array:
    """A bias for one head: as query it draws the head to the keys biased by `_pull(0, ...)` `back` tokens ago."""
    import numpy

    bias = numpy.zeros(HEAD_DIM, dtype=numpy.float32)
    half = HEAD_DIM // 2
    for pair in range(PULL_PAIRS):  # the fastest turning ones: only they tell neighbours apart
        angle = back * ROPE_THETA ** (-pair / half)
        bias[pair], bias[pair + half] = amount * math.cos(angle), -amount * math.sin(angle)
    return bias


def _layer(noise: _Noise, index: int) -> dict[str, Array]:
    """One layer's tensors."""
    import numpy

    ones = numpy.ones(HIDDEN, dtype=numpy.float32)
    queries = [noise.matrix(HEAD_DIM, HIDDEN, spread) for spread in HEAD_SPREAD]
    pull = _pull(0, KEY_PULL)
    backs = [_pull(back, amount) for back, amount in zip(LOOK_BACK[index], QUERY_PULL, strict=True)]
    none = numpy.zeros(HEAD_DIM, dtype=numpy.float32)
    return {
        "input_layernorm.weight": ones,
        "self_attn.q_proj.weight": numpy.concatenate(queries),
        "self_attn.q_proj.bias": numpy.concatenate(backs),
        "self_attn.k_proj.weight": noise.matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.bias": numpy.concatenate([none, pull]),
        "self_attn.v_proj.weight": noise.matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.bias": numpy.concatenate([none, none]),
        "self_attn.o_proj.weight": noise.matrix(HIDDEN, HIDDEN, ATTENTION_GAIN),
        "self_attn.o_proj.bias": numpy.zeros(HIDDEN, dtype=numpy.float32),
        "post_attention_layernorm.weight": ones.copy(),
        "mlp.gate_proj.weight": noise.matrix(INNER, HIDDEN),
        "mlp.up_proj.weight": noise.matrix(INNER, HIDDEN),
        "mlp.down_proj.weight": noise.matrix(HIDDEN, INNER, MLP_GAIN),
    }


if __name__ == "__main__":
    main()
