"""What a vLLM engine can never do follows from its configuration; here those of GPUs, which cannot be made on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from workers.engine.vllm_operations import limits, refusals

TORCH = {"profiler": "torch", "ignore_frontend": True}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def config(
    device: str = "cuda",
    *,
    sleep: bool = True,
    transfer: bool = False,
    profiler: dict[str, Any] = TORCH,
    elastic: str | None = "ray",
    lora: dict[str, Any] | None = None,
    model_type: str = "llama",
) -> Any:
    """The fields of a VllmConfig that are looked at."""
    text = SimpleNamespace(**SHAPE, model_type=model_type, num_hidden_layers=2)
    return SimpleNamespace(
        kv_transfer_config=object() if transfer else None,
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(
            enable_sleep_mode=sleep, hf_text_config=text, served_model_name=["m"], model="/models/base"
        ),
        profiler_config=SimpleNamespace(**profiler),
        parallel_config=SimpleNamespace(enable_elastic_ep=elastic is not None, data_parallel_backend=elastic or "mp"),
        lora_config=SimpleNamespace(**{"max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": 16, **(lora or {})}),
    )


@pytest.mark.parametrize(
    ("given", "refused", "advice"),
    [
        pytest.param(config(), None, "", id="everything is on"),
        pytest.param(config(sleep=False), "sleep", "enable_sleep_mode=true", id="no sleep mode"),
        pytest.param(config("cpu", sleep=False), None, "", id="the CPU needs none"),
        pytest.param(config(transfer=True), "sleep", "`pause`", id="passes its cache on"),
        pytest.param(config(profiler={"profiler": None}), "start_profile", "torch_profiler_dir", id="no profiler"),
        pytest.param(
            config(profiler={**TORCH, "ignore_frontend": False}),
            "stop_profile",
            "ignore_frontend: true",
            id="unsafe one",
        ),
        pytest.param(config(elastic=None), "scale_ep", "enable_elastic_ep=true", id="not elastic"),
        pytest.param(config(elastic="mp"), "scale_ep", "data_parallel_backend: ray", id="elastic without ray"),
        pytest.param(config("cpu", lora={"max_loras": 1}), "load_lora", "one more of", id="one slot on the CPU"),
    ],
)
def test_what_is_refused_comes_with_what_to_do(given: Any, refused: str | None, advice: str) -> None:
    """And nothing else is refused."""
    found = refusals(given)
    pairs = {"start_profile": "stop_profile", "stop_profile": "start_profile", "load_lora": "unload_lora"}
    assert set(found) == ({refused, pairs.get(refused, refused)} if refused else set())
    assert refused is None or advice in found[refused]


@pytest.mark.parametrize(
    ("device", "lora", "loaded"),
    [
        pytest.param("cuda", {}, 4, id="GPU: what its host keeps"),
        pytest.param("cuda", {"max_cpu_loras": None}, 2, id="GPU: its slots"),
        pytest.param("cpu", {}, 1, id="CPU: its slots but the last"),
    ],
)
def test_an_engine_takes_as_many_adapters_as_it_keeps(device: str, lora: dict[str, Any], loaded: int) -> None:
    """One more would push another out in silence."""
    found = limits(config(device, lora=lora))
    assert found
    assert found.loaded == loaded


def test_sizes_are_compared_as_far_as_they_are_known() -> None:
    """All of them for models of Llama's shape; else what goes in."""
    llama, other = limits(config()), limits(config(model_type="other"))
    assert llama
    assert other

    assert llama.complete
    assert llama.modules["k_proj"] == (64, 32)
    assert llama.modules["down_proj"] == (128, 64)
    assert not other.complete
    assert other.modules["k_proj"] == (64, None)
    assert llama.models == ("m", "base")
