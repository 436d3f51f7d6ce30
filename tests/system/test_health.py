"""Real engines that hang, die and leave: who is asked meanwhile, and that nobody is told of it.

Two deployments are shared: two aggregated workers, and two prefill workers with one decode worker.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from slurm.children import group_members
from slurm.signals import AGAIN_AFTER_S
from tests.deployments import Deployment, deployed, targets
from tests.reference import CPU_ENV, complete
from tests.system.test_lifecycle import until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

STALL_S = 5.0


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two aggregated workers whose prompts are computed in small chunks; the canaries themselves have their 30 s."""
    with deployed(
        tmp_path_factory.mktemp("pair"),
        "+recipe=tiny_agg",
        f"model.path=tiny:{tiny_model}",
        "roles.aggregated.replicas=2",
        "engine.args.max_num_batched_tokens=256",
        "engine.args.enable_chunked_prefill=true",
        "engine.args.enable_prefix_caching=false",
        "engine.canary_interval_s=1",
        f"frontend.stall_timeout_s={STALL_S}",
        name="pair",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def split(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Two prefill workers and a decode worker."""
    with deployed(
        tmp_path_factory.mktemp("split"),
        "+recipe=tiny_2p2d",
        f"model.path=tiny:{tiny_model}",
        "roles.decode.replicas=1",
        "engine.canary_interval_s=2",
        "engine.canary_timeout_s=60",
        name="split",
    ) as running:
        yield running


def page(running: Deployment, member: str, path: str) -> httpx.Response:
    """A member's own page."""
    address = next(item["targets"][0] for item in targets(running.run) if item["labels"]["member"] == member)
    return httpx.get(f"http://{address}{path}", headers=running.http.headers, timeout=10)


def well(running: Deployment, member: str) -> bool:
    """Whether the member says that it serves."""
    try:
        return page(running, member, "/health").status_code == 200
    except httpx.TransportError:
        return False


def core_of(running: Deployment, member: str) -> int:
    """The engine core's process."""
    return next(
        pid
        for pid in group_members(running.pids()[member])
        if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A process that is stopped within the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed meanwhile
            os.kill(pid, signal.SIGCONT)


def gone(pid: int) -> bool:
    """Whether the process has ended."""
    return not Path(f"/proc/{pid}").exists()


def test_the_page_of_an_engine_is_whole(pair: Deployment) -> None:
    """Prometheus reads it; vLLM's and our numbers of the same thing agree, and say whose they are."""
    before = pair.metric("aggregated-0", "baton_worker_generation_tokens_total")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: complete(pair.client, f"number {i}", False), range(8)))
    text = page(pair, "aggregated-0", "/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    whose = {"deployment": "pair", "role": "aggregated", "replica": "0", "member": "aggregated-0"}

    assert all(whose.items() <= sample.labels.items() for sample in samples)
    assert (
        len([sample for sample in samples if sample.labels.get("engine") == sample.labels.get("dp_rank") == "0"]) > 90
    )
    ours = {sample.name: sample.value for sample in samples if sample.name.startswith("baton_worker_")}
    theirs = {sample.name: sample.value for sample in samples if sample.name.startswith("vllm:")}
    assert ours["baton_worker_generation_tokens_total"] == theirs["vllm:generation_tokens_total"] > before + 100
    assert ours["baton_worker_prompt_tokens_total"] == theirs["vllm:prompt_tokens_total"]
    assert ours["baton_worker_serving"] == 1


def test_a_long_prefill_is_no_alarm(pair: Deployment) -> None:
    """Many times the stall timeout before the first token of some of them, each engine busy with nothing else."""
    words = "river stone quick light under over green seven walk think " * 230
    begun = time.monotonic()
    with ThreadPoolExecutor(64) as pool:
        answers = list(
            pool.map(
                lambda i: pair.client.completions.create(model="tiny", prompt=f"{i} {words}", max_tokens=1), range(64)
            )
        )
    took_s = time.monotonic() - begun

    assert all(answer.usage and answer.usage.prompt_tokens > 3000 for answer in answers)
    assert took_s > 2 * STALL_S, f"{took_s:.1f} s: too quick to show anything; ask for more"
    for member in ("aggregated-0", "aggregated-1"):
        assert _canaries(pair, member, "failed") == 0
        assert well(pair, member)


def test_a_stopped_engine_core_leaves_the_routing_and_comes_back(pair: Deployment) -> None:
    """Within the stall timeout, since it has requests; what it was serving goes to the other worker; health says why."""
    failed = _canaries(pair, "aggregated-0", "failed")
    with ThreadPoolExecutor(6) as pool:
        with frozen(core_of(pair, "aggregated-0")):
            stopped = time.monotonic()
            caught = [pool.submit(complete, pair.client, f"caught {i}", False) for i in range(6)]
            until(lambda: not well(pair, "aggregated-0"), 3 * STALL_S)
            out_s = time.monotonic() - stopped
            reason = page(pair, "aggregated-0", "/health").json()["reason"]
            live = page(pair, "aggregated-0", "/live").status_code
            served = [complete(pair.client, f"meanwhile {i}", False) for i in range(6)]
            answers = [item.result(30) for item in caught]
        back_s = until(lambda: well(pair, "aggregated-0"), 10)
    print(f"out after {out_s:.1f} s, back after {back_s:.2f} s")

    assert out_s < STALL_S + 1
    assert "took no step" in reason
    assert live == 200
    assert {answer.completion_tokens for answer in (*served, *answers)} == {40}
    assert _canaries(pair, "aggregated-0", "failed") == failed + 1


def test_a_killed_engine_core_costs_a_worker_and_no_request(pair: Deployment) -> None:
    """The worker exits within 2 s; what it was serving is answered by the other; the agent starts it again."""
    member = pair.pids()["aggregated-0"]
    core = core_of(pair, "aggregated-0")
    with ThreadPoolExecutor(8) as pool:
        with frozen(core):  # so that requests are caught before their first byte
            caught = [pool.submit(complete, pair.client, f"caught {i}", False) for i in range(8)]
            until(lambda: pair.metric("aggregated-0", "baton_worker_streams") > 1)
            os.kill(core, signal.SIGKILL)
        exit_s = until(lambda: gone(member), 5)
        answers = [item.result(30) for item in caught]
    print(f"exited after {exit_s:.2f} s")

    assert exit_s < 2
    assert {answer.completion_tokens for answer in answers} == {40}
    until(lambda: "aggregated-0 exited with code 1;" in _log_of_agent(pair))
    until(lambda: pair.pids()["aggregated-0"] not in (0, member) and well(pair, "aggregated-0"), 60)


def test_a_signal_to_all_processes_of_a_worker_lets_it_finish(pair: Deployment) -> None:
    """Slurm signals every process of a step: the engine core too then ends what it runs first, on one leg."""
    members = {name: pair.pids()[name] for name in ("aggregated-0", "aggregated-1")}
    legs = pair.metric("frontend-0", "baton_frontend_legs_total")
    stream = pair.client.completions.create(
        model="tiny", prompt="to the end", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    busy = next(name for name in members if pair.metric(name, "baton_worker_streams") == 1)
    os.killpg(members[busy], signal.SIGTERM)
    until(lambda: not well(pair, busy))
    finish = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices][-1]
    until(lambda: gone(members[busy]), 20)

    assert finish == "length"
    assert pair.metric("frontend-0", "baton_frontend_legs_total") == legs + 1
    until(lambda: f"{busy} exited with code 0;" in _log_of_agent(pair))


def test_canaries_of_a_prefill_engine_hold_no_blocks(split: Deployment) -> None:
    """A prefill leg would keep its blocks for a decode that never comes."""
    complete(split.client, "so that the pair has met", False)
    until(lambda: _canaries(split, "prefill-0", "answered") > 1, 20)
    until(lambda: split.metric("prefill-0", "baton_worker_kv_usage_ratio") == 0)

    assert split.metric("prefill-0", "baton_worker_nixl_expired_leases_total") == 0
    assert split.metric("decode-0", "baton_worker_nixl_transfers_total") >= 1
    assert split.metric("decode-0", "baton_worker_nixl_transferred_bytes_total") > 0
    assert split.metric("decode-0", "baton_worker_nixl_transfer_seconds_total") > 0


def test_a_leaving_prefill_worker_waits_for_its_pulls(split: Deployment) -> None:
    """SIGTERM while a decode engine, frozen, has yet to pull: the answer comes, and then the worker goes."""
    for i in range(4):
        complete(split.client, f"every pair has met {i}", False)
    members = {name: split.pids()[name] for name in ("prefill-0", "prefill-1")}
    with ThreadPoolExecutor(4) as pool:
        with frozen(core_of(split, "decode-0")):
            asked = [pool.submit(complete, split.client, f"pulled late {i}", False) for i in range(4)]
            until(lambda: all(split.metric(name, "baton_worker_kv_usage_ratio") > 0 for name in members))
            os.kill(members["prefill-0"], signal.SIGTERM)
            until(lambda: not well(split, "prefill-0"))
            time.sleep(2)  # a worker that did not wait would be gone by now
            waiting = not gone(members["prefill-0"])
        answers = [item.result(30) for item in asked]
    until(lambda: gone(members["prefill-0"]), 15)

    assert waiting
    assert {answer.completion_tokens for answer in answers} == {40}
    assert split.metric("decode-0", "baton_worker_nixl_failed_transfers_total") == 0
    until(lambda: split.pids()["prefill-0"] not in (0, members["prefill-0"]) and well(split, "prefill-0"), 60)


def test_a_prefill_worker_is_restarted_and_nobody_notices(split: Deployment) -> None:
    """A steady stream of disaggregated requests from its SIGTERM until it serves again: none fails.

    With pauses, because two cores that only answer start no engine meanwhile.
    """
    before = split.pids()["prefill-1"]
    done = False

    def ask(number: int) -> int:
        count = 0
        while not done:
            assert complete(split.client, f"request {count} of {number}", bool(count % 2)).completion_tokens == 40
            count += 1
            time.sleep(0.3)
        return count

    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(ask, number) for number in range(4)]
        os.kill(before, signal.SIGTERM)
        try:
            until(lambda: gone(before), 30)
            until(lambda: split.pids()["prefill-1"] not in (0, before) and well(split, "prefill-1"), 90)
        finally:
            done = True
        served = [stream.result(60) for stream in streams]
    print(f"{sum(served)} requests, none failed")

    assert min(served) > 3
    assert "prefill-1 exited with code 0;" in _log_of_agent(split)


def test_a_second_sigterm_ends_a_worker_at_once(split: Deployment) -> None:
    """While it waits for pulls; the engine goes with it, and the request finds another way."""
    members = {name: split.pids()[name] for name in ("prefill-0", "prefill-1")}
    with ThreadPoolExecutor(4) as pool:
        with frozen(core_of(split, "decode-0")):
            # Long enough that one prefill worker does not get them all.
            asked = [pool.submit(complete, split.client, f"{i} " + "twice " * 300, False) for i in range(4)]
            until(lambda: split.metric("prefill-0", "baton_worker_kv_usage_ratio") > 0)
            os.kill(members["prefill-0"], signal.SIGTERM)
            told = time.monotonic()
            until(lambda: not well(split, "prefill-0") and time.monotonic() - told > 2 * AGAIN_AFTER_S)
            os.kill(members["prefill-0"], signal.SIGTERM)
            ended_s = until(lambda: gone(members["prefill-0"]), 5)
            until(lambda: not group_members(members["prefill-0"]), 5)
        answers = [item.result(60) for item in asked]

    assert ended_s < 1
    assert {answer.completion_tokens for answer in answers} == {40}
    until(lambda: "prefill-0 exited with code 143;" in _log_of_agent(split))


DATA_PARALLEL = """
import asyncio, json, os, signal, sys, time

async def main(engine):
    from workers.engine.health import ask_one_token
    llm = engine._llm
    await ask_one_token(engine, "warm", 0)
    before = {rank: stats.generation_tokens for rank, stats in engine.stats.items()}
    await ask_one_token(engine, "one", 1)
    after = {rank: stats.generation_tokens for rank, stats in engine.stats.items()}
    victim = llm.engine_core.resources.engine_manager.processes[1].pid
    alive = engine.dead()
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    while engine.dead() is None:
        await asyncio.sleep(0.02)
    seen_s = time.monotonic() - killed
    print(json.dumps({"before": before, "after": after, "alive": alive, "death": engine.dead(), "seen_s": seen_s}))

if __name__ == "__main__":
    from workers.engine import vllm_engine
    from workers.engine.leaving import leave_at_once
    from workers.engine.options import ServingOptions
    from workers.engine.orphans import die_with
    die_with(os.getpid())
    engine = vllm_engine.start(json.loads(sys.argv[1]), ServingOptions())
    asyncio.run(main(engine))
    leave_at_once(0)
"""


def test_a_fallen_data_parallel_rank_is_seen_at_once(tiny_model: Path, tmp_path: Path) -> None:
    """vLLM says so after 6 s only; and a canary asks the rank it was sent to."""
    arguments = {
        "model": str(tiny_model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 32 << 20,
        "block_size": 32,
        "data_parallel_size": 2,
    }
    script = tmp_path / "dp.py"
    script.write_text(DATA_PARALLEL)
    env = {**os.environ, **CPU_ENV, "TMPDIR": str(tmp_path)}
    argv = [sys.executable, str(script), json.dumps(arguments)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=150, check=False, cwd=Path.cwd())
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"before"')]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    said = json.loads(lines[0])

    assert said["alive"] is None
    assert said["after"]["1"] == said["before"]["1"] + 1
    assert said["after"]["0"] == said["before"]["0"]
    assert "EngineCore_DP1" in said["death"]
    assert said["seen_s"] < 2


def _canaries(running: Deployment, member: str, result: str) -> float:
    for family in text_string_to_metric_families(page(running, member, "/metrics").text):
        for sample in family.samples:
            if sample.name == "baton_worker_canaries_total" and sample.labels["result"] == result:
                return sample.value
    raise AssertionError("no such counter")


def _log_of_agent(running: Deployment) -> str:
    folder = running.run.logs(1)
    return "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".err", ".out", ".log"))


@pytest.mark.nightly
def test_a_stopped_rank_of_a_tensor_parallel_engine_is_found_though_the_others_spin(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Within the stall timeout of its requests; it serves again once the rank goes on."""
    with deployed(
        tmp_path,
        "+recipe=tiny_tp2",
        f"model.path=tiny:{tiny_model}",
        f"frontend.stall_timeout_s={STALL_S}",
        name="ranks",
    ) as running:
        complete(running.client, "warm up", False)
        rank = next(
            pid
            for pid in group_members(running.pids()["aggregated-0"])
            if b"Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        with ThreadPoolExecutor(1) as pool:
            with frozen(rank):
                stopped = time.monotonic()
                pool.submit(complete, running.client, "caught", False)
                until(lambda: not well(running, "aggregated-0"), 3 * STALL_S)
                out_s = time.monotonic() - stopped
            back_s = until(lambda: well(running, "aggregated-0"), 30)
        answer = complete(running.client, "and again", False)
    print(f"out after {out_s:.1f} s, back after {back_s:.1f} s")

    assert out_s < STALL_S + 1
    assert answer.completion_tokens == 40
