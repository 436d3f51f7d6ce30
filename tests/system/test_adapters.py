"""LoRA adapters are models of their own: loaded by an operator, asked for by name, with plain vLLM's answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from tests.adapters import make_adapter
from tests.deployments import Deployment, deployed
from tests.reference import plain_vllm

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NAMES = ("poet", "clerk")
PROMPTS = ("The river was quick", "write code for the sea " * 12, "seven stones")
# On the CPU vLLM needs one more slot than there are adapters (docs/operations.md).
LORA = {"enable_lora": "", "max_loras": "3", "max_lora_rank": "8"}
Answers = dict[tuple[str, str], str | None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good adapters, and one of too large a rank."""
    found = tmp_path_factory.mktemp("lora")
    for number, name in enumerate(NAMES):
        make_adapter(found / name, seed=number)
    make_adapter(found / "giant", rank=16)
    return found


@pytest.fixture(scope="module")
def expected(tiny_model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What plain vLLM's server answers; it runs only while it is asked."""
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with plain_vllm(tiny_model, tmp_path_factory.mktemp("plain-lora"), env, **LORA) as base:
        for name in NAMES:
            body = {"lora_name": name, "lora_path": str(folder / name)}
            httpx.post(f"{base}/v1/load_lora_adapter", json=body, timeout=60).raise_for_status()
        with OpenAI(base_url=f"{base}/v1", api_key="none", timeout=60) as client:
            return answers(client)


@pytest.fixture(scope="module")
def deployment(
    tiny_model: Path, folder: Path, expected: Answers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """A prefill and a decode engine: both need the adapter."""
    args = [f"engine.args.{name}={value or 'true'}" for name, value in LORA.items()]
    here = [f"model.path=tiny:{tiny_model}", f"engine.lora_dirs=[{folder}]"]
    with deployed(tmp_path_factory.mktemp("adapters"), "+recipe=tiny_disagg", *args, *here, name="adapters") as running:
        yield running


def answers(client: OpenAI) -> Answers:
    """Greedy completions of the base model and of every adapter."""
    found: Answers = {}
    for model in ("tiny", *NAMES):
        for prompt in PROMPTS:
            told = client.completions.create(
                model=model, prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
            )
            found[model, prompt] = told.choices[0].text
            assert told.model == model
    return found


def ctl(deployment: Deployment, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m launch.ctl`."""
    argv = [sys.executable, "-m", "launch.ctl", deployment.run.name, *arguments]
    argv += ["--runs-dir", str(deployment.run.path.parent)]
    return subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)


def test_adapters_are_loaded_asked_for_by_name_and_gone_again(
    deployment: Deployment, folder: Path, expected: Answers
) -> None:
    """With plain vLLM's answers through both legs; listed with their parent; unloaded, they do not exist."""
    for name in NAMES:
        loaded = ctl(deployment, "load_lora", f"name={name}", f"path={folder / name}")
        assert loaded.returncode == 0, loaded.stdout + loaded.stderr
    listed = {model.id: model.model_dump().get("parent") for model in deployment.client.models.list()}
    pulled = deployment.metric("decode-0", "vllm:nixl_bytes_transferred_sum")
    found = answers(deployment.client)

    assert listed == {"tiny": None, "poet": "tiny", "clerk": "tiny"}
    assert found == expected
    assert len({found[model, PROMPTS[0]] for model in ("tiny", *NAMES)}) == 3  # else the adapters would prove nothing
    assert deployment.metric("decode-0", "vllm:nixl_bytes_transferred_sum") > pulled

    assert ctl(deployment, "unload_lora", "name=poet").returncode == 0
    with pytest.raises(openai.NotFoundError, match="'poet' does not exist; this deployment serves 'tiny', 'clerk'"):
        deployment.client.completions.create(model="poet", prompt="x")
    assert deployment.client.completions.create(model="clerk", prompt="x").choices


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_else_changes(deployment: Deployment, folder: Path) -> None:
    """By its rank, or for being nowhere; the workers live on."""
    before = deployment.pids()
    giant = ctl(deployment, "load_lora", "name=giant", f"path={folder / 'giant'}")
    nowhere = ctl(deployment, "load_lora", "name=ghost", f"path={folder / 'ghost'}")
    outside = ctl(deployment, "load_lora", "name=etc", "path=/etc")

    assert [giant.returncode, nowhere.returncode, outside.returncode] == [1, 1, 1]
    assert "rank" in giant.stdout + giant.stderr
    assert deployment.client.completions.create(model="tiny", prompt="still there").choices
    assert deployment.pids() == before
