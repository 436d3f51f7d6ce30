"""Engine processes on the CPU sleep while they wait for each other, and miss nothing by it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import pytest

from workers.engine import cpu

QUIET_S = 0.9  # within the second for which vLLM's own readers yield in a loop
MESSAGES = 400


@pytest.fixture
def shm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's queues, calmed for one test."""
    module = pytest.importorskip("vllm.distributed.device_communicators.shm_broadcast")
    monkeypatch.setattr(module, "SpinCondition", module.SpinCondition)
    cpu.calm_queues()
    return module


def reading(shm: Any, send: Callable[[Any], None]) -> dict[str, Any]:
    """What a reader in a process of its own says of the messages that `send` writes, the last of which is None."""
    fork: Any = multiprocessing.get_context("fork")  # as engine processes come to be (workers.engine.configuration)
    writer = shm.MessageQueue(n_reader=1, n_local_reader=1, max_chunk_bytes=1 << 16)
    here, there = fork.Pipe()

    def read() -> None:
        reader = shm.MessageQueue.create_from_handle(writer.export_handle(), 0)
        reader.wait_until_ready()
        found: list[Any] = []
        used = longest = 0.0
        while True:
            before, begun = time.monotonic(), time.process_time()
            message = reader.dequeue(timeout=60)
            used = time.process_time() - begun
            longest = max(longest, time.monotonic() - before)
            if message is None:
                break
            found.append(message)
        there.send({"found": found, "waiting_cpu_s": used, "longest_s": longest})

    process = fork.Process(target=read, daemon=True)
    process.start()
    writer.wait_until_ready()
    send(writer)
    assert here.poll(60), "the reader waits for a message that was written"
    said: dict[str, Any] = here.recv()
    process.join()
    return said


@pytest.mark.engine
def test_a_reader_sleeps_soon_after_a_message(shm: Any) -> None:
    """Where vLLM would yield in a loop, and keep engines that have work off the core."""

    def send(writer: Any) -> None:
        writer.enqueue("first")
        time.sleep(QUIET_S)  # the quiet is what is looked at
        writer.enqueue(None)

    assert reading(shm, send)["waiting_cpu_s"] < 0.25 * QUIET_S


@pytest.mark.engine
def test_no_message_waits_for_the_recheck(shm: Any) -> None:
    """Messages of any distance are read in their order: one whose word is lost would cost 5 s."""

    def send(writer: Any) -> None:
        for number in range(MESSAGES):
            writer.enqueue(number)
            time.sleep((number % 8) * 0.0005)
        time.sleep(3 * cpu.LOOK_S)
        writer.enqueue(None)

    said = reading(shm, send)

    assert said["found"] == list(range(MESSAGES))
    assert said["longest_s"] < shm.SHM_READER_RECHECK_INTERVAL_MS / 1000 - 1
