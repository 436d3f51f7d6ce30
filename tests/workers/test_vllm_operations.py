"""Operations on a real vLLM engine on the CPU; `tests.vllm_probe` performs them, in the order of these tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_probe import BAD

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def shown(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each step showed."""
    folder = tmp_path_factory.mktemp("probe")
    argv = [sys.executable, "-m", "tests.vllm_probe", str(tiny_model), str(folder)]
    with (folder / "probe.log").open("w") as log:
        env = {**os.environ, "TMPDIR": str(folder)}
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=log, text=True, timeout=240, env=env, check=False)
    marked = [line for line in done.stdout.splitlines() if line.startswith("PROBE ")]
    assert done.returncode == 0, (folder / "probe.log").read_text()[-4000:]
    found: dict[str, Any] = json.loads(marked[0].removeprefix("PROBE "))
    return found


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_refused_before_vllm_sees_it(shown: dict[str, Any], name: str) -> None:
    """As the client's error, and the engine answers as before."""
    assert shown["bad"][name]["status"] in (400, 404)
    assert shown["loads of bad ones"] == 0
    assert shown["base after bad ones"] == shown["base"]


def test_vllm_itself_would_take_some_of_them(shown: dict[str, Any]) -> None:
    """Which is why they are checked; what it refuses it survives, and nothing stays behind."""
    told, left, dead = shown["refused by vllm"]

    assert {line.partition(":")[0] for line in told if line.endswith(": taken")} == {"size", "layer"}
    assert left == []
    assert dead is None


def test_twenty_loads_are_one(shown: dict[str, Any]) -> None:
    """Of vLLM's `add_lora`; and twenty successes."""
    assert shown["loads of twenty"] == 1
    assert sorted(answer["loaded"] for answer in shown["twenty"]) == [False] * 19 + [True]


def test_one_adapter_too_many_is_refused(shown: dict[str, Any]) -> None:
    """vLLM would drop the one that was used least lately, and its requests would load it again from disk."""
    assert shown["b"]["loaded"]
    assert shown["full"]["status"] == 409
    assert len(shown["ids"]) == 2


def test_each_adapter_answers_in_its_own_way(shown: dict[str, Any]) -> None:
    """Alone, after each other, and in one step with requests of the others and of the base model."""
    a, b, again, base = shown["texts"]

    assert len({tuple(text) for text in (a, b, base)}) == 3
    assert again == a
    assert base == shown["base"]
    assert shown["together"] == [a, b, base]


def test_an_unloaded_adapter_is_gone(shown: dict[str, Any]) -> None:
    """From the engine, and from what the frontends were told."""
    assert shown["unload"] == {}
    assert len(shown["ids after"]) == 1
    assert shown["published"] == [["a"], ["a", "b"], ["a"]]


def test_new_files_in_the_same_folder_are_not_answered_from_the_old_cache(shown: dict[str, Any]) -> None:
    """The prefix cache still has the old adapter's blocks for the prompt; a fresh engine's answer is the measure."""
    assert shown["same files"] == shown["texts"][0]
    assert shown["new files"] == shown["new files, cache cleared"]
    assert shown["new files"] != shown["same files"]


def test_the_cache_is_cleared_unless_it_is_in_use(shown: dict[str, Any]) -> None:
    """And it is said when it is not."""
    assert shown["clear"] == {"cleared": True}
    assert shown["clear while blocks are held"]["status"] == 409


def test_a_paused_engine_takes_no_step(shown: dict[str, Any]) -> None:
    """And goes on when resumed."""
    resumed, paused, text = shown["resume"]

    assert shown["pause"]["state"] == "paused"
    assert shown["paused"]
    assert not shown["paused generates"]
    assert resumed["state"] == "serving"
    assert not paused
    assert text == shown["base"]


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_sleeps_and_wakes(shown: dict[str, Any], level: int) -> None:
    """It answers as before, its adapters too. (On the CPU the state changes and the memory does not.)"""
    slept, sleeping, clear, status, woken, still, serving, base, adapter = shown[f"sleep {level}"]

    assert (slept["state"], sleeping) == ("asleep", True)
    assert clear["status"] == 409
    assert status["level"] == level
    assert (woken["state"], still, serving) == ("serving", False, True)
    assert base == shown["base"]
    assert adapter == shown["new files"]


def test_an_adapter_whose_files_are_gone_is_lost_in_a_deep_sleep(shown: dict[str, Any]) -> None:
    """It is named, no longer served, and the worker serves on."""
    woken, listed, text = shown["adapter lost"]

    assert woken == {"state": "serving", "adapters_lost": ["a"]}
    assert listed == {"adapters": []}
    assert text == shown["base"]


def test_a_worker_drains_and_serves(shown: dict[str, Any]) -> None:
    """It is withdrawn in between."""
    assert shown["drain"] == [{"given_back": 0, "state": "draining"}, False, {"state": "serving"}, True]


def test_a_profile_is_recorded(shown: dict[str, Any]) -> None:
    """Once at a time; the trace is where it was said."""
    started, again, text, stopped = shown["profile"]

    assert started["folder"].endswith("/traces")
    assert again["status"] == 409
    assert text == shown["base"]
    assert stopped == {}
    assert [name for name in shown["traces"] if "trace.json" in name]


def test_what_an_engine_can_never_do_is_refused_with_the_reason(shown: dict[str, Any]) -> None:
    """By its configuration; and it has survived all of this."""
    refused = shown["refused by configuration"]

    assert "register" in refused["sleep"]
    assert "pause" in refused["sleep"]
    assert "profiler_config" in refused["start_profile"]
    assert "enable_lora=true" in refused["load_lora"]
    assert "enable_elastic_ep" in refused["scale_ep"]
    assert "max_loras" in shown["refused with one slot"]["load_lora"]
    assert shown["scale"]["status"] == 501
    assert shown["dead"] is None
