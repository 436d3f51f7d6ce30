"""Plain vLLM's answers, from its own API server, for prompts of 5 to 1,500 tokens: what every deployment must say too."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from tokenizers import Tokenizer

from slurm.ports import is_free

MODEL = "tiny"
ANSWER_TOKENS = 40
PROMPTS = 50
WORDS = [
    "the",
    "a",
    "river",
    "stone",
    "quick",
    "light",
    "under",
    "over",
    "green",
    "seven",
    "walk",
    "think",
    "of",
    "and",
    "because",
    "machine",
    "number",
    "sea",
    "bridge",
    "write",
    "code",
    "return",
    "value",
    "def",
    "class",
    "import",
    "for",
    "while",
    "data",
    "node",
    "rank",
    "cache",
    "token",
    "model",
    "café",
    "naïve",
    "日本",
    "\n",
    ",",
    ".",
    ";",
    "?",
]
CPU_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client sees of one request."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Reference:
    """Prompts with plain vLLM's answers to them, as completions and as chats."""

    prompts: tuple[str, ...]
    completions: tuple[Answer, ...]
    chats: tuple[Answer, ...]


def prompts(model: Path) -> tuple[str, ...]:
    """Texts of 5 to 1,500 tokens, all different, the same in every run."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rng = random.Random(7)
    lengths = [5, 6, 8, 31, 32, 33, 63, 64, 65, 1500]
    lengths += [rng.randint(5, 400) for _ in range(30)] + [rng.randint(400, 1500) for _ in range(PROMPTS - 40)]
    found = []
    for length in lengths:
        text = " ".join(rng.choice(WORDS) for _ in range(length))
        ids = tokenizer.encode(text, add_special_tokens=False).ids[: length - 1]
        found.append(tokenizer.decode(ids))
    return tuple(found)


def complete(client: OpenAI, prompt: str, stream: bool) -> Answer:
    """Ask /v1/completions."""
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=ANSWER_TOKENS, temperature=0, extra_body={"ignore_eos": True}, **more
    )
    if not stream:
        choice = answer.choices[0]
        return _answer(choice.text, choice.finish_reason, answer.usage)
    return _collect(answer, lambda choice: choice.text)


def chat(client: OpenAI, prompt: str, stream: bool) -> Answer:
    """Ask /v1/chat/completions."""
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
        **more,
    )
    if not stream:
        choice = answer.choices[0]
        return _answer(choice.message.content, choice.finish_reason, answer.usage)
    return _collect(answer, lambda choice: choice.delta.content)


def ask_all(client: OpenAI, texts: tuple[str, ...], ask: Any, stream: bool, at_once: int = 8) -> tuple[Answer, ...]:
    """Ask for all prompts, some at once."""
    with ThreadPoolExecutor(at_once) as pool:
        return tuple(pool.map(lambda text: ask(client, text, stream), texts))


@contextlib.contextmanager
def plain_vllm(model: Path, folder: Path, env: Mapping[str, str] | None = None, /, **arguments: str) -> Iterator[str]:
    """vLLM's own API server on the model; yields its base URL. `arguments` are more of its options, "" for a flag."""
    port = next(port for port in range(33000, 34000) if is_free(port))
    options = {
        "model": str(model),
        "served_model_name": MODEL,
        "host": "127.0.0.1",
        "port": str(port),
        "dtype": "float32",
        "max_model_len": "4096",
        "block_size": "32",
        "kv_cache_memory_bytes": str(128 << 20),
        "max_num_seqs": "32",
        "enforce_eager": "",
    }
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in (options | arguments).items():
        flag = f"--{name.replace('_', '-')}"
        argv.append(f"{flag}={value}" if value else flag)
    with (folder / "vllm.log").open("w") as log:
        whole = {**os.environ, **CPU_ENV, **(env or {}), "TMPDIR": str(folder)}
        server = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=whole, start_new_session=True)
    try:
        _wait_until_up(server, port, folder / "vllm.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
            server.wait()


def reference_answers(model: Path, folder: Path) -> Reference:
    """Start vLLM's API server, collect its answers, end it."""
    texts = prompts(model)
    with (
        plain_vllm(model, folder) as base,
        OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        return Reference(texts, ask_all(client, texts, complete, False), ask_all(client, texts, chat, False))


def _wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if server.poll() is not None:
            break
        time.sleep(0.5)
    raise AssertionError(f"plain vLLM did not start:\n{log.read_text()[-4000:]}")


def _collect(stream: Any, text_of: Any) -> Answer:
    parts, finish, usage = [], None, None
    for chunk in stream:
        for choice in chunk.choices:
            parts.append(text_of(choice) or "")
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    return _answer("".join(parts), finish, usage)


def _answer(text: str | None, finish: str | None, usage: Any) -> Answer:
    assert text is not None
    assert finish is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return Answer(text, finish, usage.prompt_tokens, usage.completion_tokens)
