"""A hand-over by a person's word, with the local launcher."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from openai import OpenAI

from launch.chain import Chain
from launch.gateway import opened
from launch.records import Phase, RunDirectory
from tests.deployments import command, processes_of
from tests.reference import complete

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(240)]


def do(folder: Path, what: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m launch.<what>`."""
    argv = [sys.executable, "-m", f"launch.{what}", *words, "--runs-dir", str(folder / "runs")]
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)


async def test_a_link_that_a_person_starts_takes_over(tmp_path: Path, tiny_model: Path) -> None:
    """`launch.handover`, as after an update: both run on one machine, no request through the gateway fails, and the old link
    leaves; `launch.stop` ends the chain, and a second hand-over is refused from then on."""
    words = ("+recipe=tiny_agg", "engine.backend=echo", f"model.path=tiny:{tiny_model}", "wait=ready", "chain=5")
    argv = command(tmp_path, *words, "handover.grace_s=2", "engine.drain_s=5", name="here")
    launched = await asyncio.to_thread(subprocess.run, argv, check=False, capture_output=True, text=True, timeout=120)
    assert launched.returncode == 0, launched.stderr
    chain = Chain(tmp_path / "runs" / "here")
    key, failed, answered, over = RunDirectory(chain.path).api_key(), list[str](), list[int](), threading.Event()

    def ask(url: str) -> None:
        with OpenAI(base_url=url, api_key=key, max_retries=0) as client:
            while not over.is_set():
                try:
                    answered.append(complete(client, "hello", len(answered) % 2 == 0).completion_tokens)
                except Exception as error:  # noqa: BLE001  # whatever a client sees counts
                    failed.append(repr(error))

    def hand_over() -> subprocess.CompletedProcess[str]:
        done, deadline = do(tmp_path, "handover", "here"), time.monotonic() + 90
        while (life := chain.link(1).life(1)) is None or life.ended_at is None:
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.2)
        return done

    async with opened(chain.path, None, "127.0.0.1", 0, 30) as url:
        asking = [asyncio.create_task(asyncio.to_thread(ask, url)) for _ in range(3)]
        done = await asyncio.to_thread(hand_over)
        over.set()
        await asyncio.gather(*asking)
    endpoint = chain.endpoint()
    listed = json.loads(do(tmp_path, "list", "--json").stdout)
    stopped = do(tmp_path, "stop", "here")
    late = do(tmp_path, "handover", "here")

    assert failed == []
    assert set(answered) == {40}
    assert "here/links/2 submitted" in done.stdout, done.stderr
    assert endpoint
    assert (endpoint.link, endpoint.state) == (2, Phase.READY)
    assert [(item["link"], item["state"], item["seconds_left"]) for item in listed] == [(2, "ready", None)]
    assert stopped.stdout == "here stopped\n", stopped.stderr
    assert "here is stopping: launch it again" in late.stderr
    assert processes_of(RunDirectory(chain.path)) == {}
