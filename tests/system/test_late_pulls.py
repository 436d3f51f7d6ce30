"""Pulls that come too late: an engine or its worker stands still past the lease of what was prefilled, and no answer is wrong.

After the lease the prefill engine gives the blocks to other prompts, and vLLM 0.32 hands a late pull whatever is in them.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APIStatusError, OpenAI

from tests.chaos.faults import frozen
from tests.deployments import Deployment, deployed
from tests.reference import ANSWER_TOKENS, MODEL, Reference

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(600)]

LEASE_S = 8
STILL_S = 12.0
AT_ONCE = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """A prefill and a decode engine with little memory, so that blocks are soon another prompt's; nobody is taken for stalled."""
    patience = [
        f"{key}=120" for key in ("frontend.stall_timeout_s", "engine.canary_interval_s", "engine.canary_timeout_s")
    ]
    shape = ("+recipe=tiny_disagg", f"engine.kv_lease_s={LEASE_S}", "engine.args.kv_cache_memory_bytes=33554432")
    folder = tmp_path_factory.mktemp("late")
    with deployed(folder, *shape, *patience, f"model.path=tiny:{tiny_model}", name="late") as running:
        yield running


@pytest.mark.parametrize("member", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("part", ["worker", "core"])
def test_a_pull_past_the_lease_is_nobody_s_answer(
    pair: Deployment, reference: Reference, member: str, part: str
) -> None:
    """Twelve requests at a time, each pulled anew, while one process stands still for longer than the lease: every answer is
    plain vLLM's, those in the middle of the pause included, and the same processes serve afterwards."""
    before = pair.pids()
    pid = before[member]
    still = [pid] if part == "worker" else descendants(pid)
    assert still, "the engine's core is a process of its own"
    stop, wrong, right = threading.Event(), list[str](), itertools.count()
    salts = itertools.count(random.SystemRandom().randrange(1 << 30))

    def client() -> None:
        rng = random.Random(next(salts))
        while not stop.is_set():
            index = rng.randrange(len(reference.prompts))
            told = ask(pair.client, reference.prompts[index], f"s{next(salts)}")
            if told == reference.completions[index].text:
                next(right)
            else:
                wrong.append(told)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        clients = [pool.submit(client) for _ in range(AT_ONCE)]
        for _ in range(2):
            time.sleep(4)
            with frozen(still):
                time.sleep(STILL_S)
        time.sleep(8)
        stop.set()
        for each in clients:
            each.result(timeout=120)

    assert not wrong, wrong[:3]
    assert next(right) > AT_ONCE
    assert pair.pids() == before


def ask(client: OpenAI, prompt: str, salt: str) -> str:
    """The text of an answer whose prompt no engine has cached; of an error its message."""
    try:
        answer = client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True, "cache_salt": salt},
        )
    except APIStatusError as error:
        return f"{error.status_code}: {error.message}"
    return answer.choices[0].text


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return [child for child in found if os.path.exists(f"/proc/{child}")]
