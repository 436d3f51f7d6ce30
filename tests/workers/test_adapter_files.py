"""Adapters are checked before an engine sees them: where they are, and whether they fit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.tiny_model import HEAD_DIM, HIDDEN, INNER, KV_HEADS, LAYERS
from tests.adapters import SIZES, make_adapter
from workers.engine.adapter_files import check, folder_of
from workers.engine.base import AdapterLimits
from workers.runtime.commands import OperationError

LIMITS = AdapterLimits(
    loaded=2,
    rank=8,
    models=("tiny",),
    layers=LAYERS,
    modules={
        "q_proj": (HIDDEN, HIDDEN),
        "v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
        "o_proj": (HIDDEN, HIDDEN),
        "down_proj": (INNER, HIDDEN),
    },
    complete=True,
)


def test_an_adapter_that_fits_is_taken(tmp_path: Path) -> None:
    """Its rank is told; its digest changes with its files, and only then."""
    folder = make_adapter(tmp_path / "a", modules=SIZES)
    first, again = check(folder, LIMITS, [str(tmp_path)]), check(folder, LIMITS, [str(tmp_path)])
    make_adapter(folder, modules=SIZES, seed=1)
    other = check(folder, LIMITS, [str(tmp_path)])

    assert first.rank == 8
    assert first == again
    assert other.digest != first.digest


def _truncate(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def _header(raw: bytes) -> Callable[[Path], object]:
    """A weights file with that header."""
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


def _tensor(name: str, shape: list[int]) -> Callable[[Path], object]:
    """A weights file with one tensor, of no bytes: the header alone is read."""
    return _header(json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode())


@pytest.mark.parametrize(
    ("break_it", "status", "message"),
    [
        pytest.param(lambda f: make_adapter(f, rank=16), 400, r"rank 16.*up to 8.*max_lora_rank=16", id="rank"),
        pytest.param(
            lambda f: make_adapter(f, config={"rank_pattern": {"v_proj": 64}}), 400, "rank 64", id="rank of one module"
        ),
        pytest.param(lambda f: make_adapter(f, config={"r": "8"}), 400, "must be numbers", id="rank is text"),
        pytest.param(lambda f: make_adapter(f, config={"r": 0}), 400, "must be numbers", id="rank 0"),
        pytest.param(lambda f: make_adapter(f, config={"lora_alpha": None}), 400, "lora_alpha", id="no alpha"),
        pytest.param(lambda f: make_adapter(f, config={"use_dora": True}), 400, "use_dora", id="DoRA"),
        pytest.param(lambda f: make_adapter(f, config={"bias": "all"}), 400, "bias='all'", id="bias"),
        pytest.param(lambda f: make_adapter(f, config={"peft_type": "IA3"}), 400, "IA3", id="no LoRA"),
        pytest.param(lambda f: make_adapter(f, config={"modules_to_save": ["lm_head"]}), 400, "lm_head", id="head"),
        pytest.param(lambda f: make_adapter(f, config={"target_modules": None}), 400, "target_modules", id="targets"),
        pytest.param(
            lambda f: make_adapter(f, sizes=SIZES | {"o_proj": (128, HIDDEN)}), 400, "size 256", id="too small"
        ),
        pytest.param(
            lambda f: make_adapter(f, sizes=SIZES | {"v_proj": (128, 512)}), 400, "another model", id="too wide"
        ),
        pytest.param(lambda f: make_adapter(f, modules=["w_proj"]), 400, "no module 'w_proj'", id="module"),
        pytest.param(lambda f: make_adapter(f, layers=[LAYERS]), 400, f"layer {LAYERS} of", id="layer"),
        pytest.param(lambda f: (f / "adapter_config.json").unlink(), 404, "no adapter_config.json", id="no config"),
        pytest.param(lambda f: (f / "adapter_config.json").write_text("{"), 400, "cannot be read", id="half a config"),
        pytest.param(lambda f: (f / "adapter_config.json").write_text("[]"), 400, "not a JSON object", id="a list"),
        pytest.param(
            lambda f: (f / "adapter_config.json").write_text("[" * 100_000), 400, "cannot be read", id="deep config"
        ),
        pytest.param(
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), 404, "safetensors", id="pickle"
        ),
        pytest.param(_truncate, 400, "bytes and should have", id="truncated"),
        pytest.param(_header(b"[1, 2]"), 400, "not a safetensors file", id="header is a list"),
        pytest.param(_header(b'{"a": 1}'), 400, "not a safetensors file", id="tensor is a number"),
        pytest.param(_header(b"{}"), 400, "no lora_A or lora_B", id="no tensors"),
        pytest.param(
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64), 400, "not a safetensors", id="noise"
        ),
        pytest.param(
            _tensor("model.layers.0.self_attn.q_proj.weight", [256, 256]), 400, "no part of", id="whole model"
        ),
        pytest.param(_tensor("x.layers.0.self_attn.q_proj.lora_A.weight", [8, 256]), 400, "only one of", id="half"),
        pytest.param(_tensor("x.layers.0.self_attn.q_proj.lora_A.weight", [8]), 400, "two dimensions", id="a vector"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, break_it: Callable[[Path], object], status: int, message: str
) -> None:
    """By name of what is wrong, as the client's error."""
    folder = make_adapter(tmp_path / "a")
    break_it(folder)
    with pytest.raises(OperationError, match=message) as error:
        check(folder, LIMITS, [str(tmp_path)])

    assert error.value.status == status


def test_a_model_whose_layers_are_unknown_goes_by_its_name(tmp_path: Path) -> None:
    """Where nothing can be compared, an adapter for a model of another name is refused."""
    unknown = replace(LIMITS, modules={}, complete=False)
    folder = make_adapter(tmp_path / "a")
    assert check(folder, unknown, [str(tmp_path)]).rank == 8
    with pytest.raises(OperationError, match="made for 'somewhere/tiny', not for 'large'"):
        check(folder, replace(unknown, models=("large",)), [str(tmp_path)])


@pytest.mark.parametrize(
    ("path", "uri", "status", "message"),
    [
        pytest.param("{tmp}/other/a", None, 403, "not in a folder", id="outside"),
        pytest.param("{tmp}/lora/../other/a", None, 403, "not in a folder", id="dots"),
        pytest.param("{tmp}/lora/link", None, 403, "not in a folder", id="a link to outside"),
        pytest.param("{tmp}/lorax/a", None, 403, "not in a folder", id="a name that begins alike"),
        pytest.param("{tmp}/other/none", None, 403, "not in a folder", id="whether it exists is not told"),
        pytest.param("{tmp}/lora/loop", None, 400, "cannot be followed|is not in", id="a loop of links"),
        pytest.param("lora/a", None, 400, "not an absolute path", id="relative"),
        pytest.param("/a\0b", None, 400, "not an absolute path", id="zero byte"),
        pytest.param(None, None, 400, "either path=", id="nothing"),
        pytest.param("/a", "file:///a", 400, "either path=", id="both"),
        pytest.param(None, "s3://bucket/a", 400, "nothing here fetches s3:", id="s3"),
        pytest.param(None, "hf://org/a", 404, "hf download org/a --cache-dir", id="not in a cache of the Hub"),
        pytest.param(None, "hf://org/../../other", 400, "no name of the Hugging Face Hub", id="no name of the Hub"),
        pytest.param(None, "hf://org/linked", 403, "not in a folder", id="a snapshot that is a link to outside"),
        pytest.param(None, "file://host/a", 400, "another host", id="another host"),
        pytest.param(None, "file://{tmp}/lora/%2e%2e/other/a", 403, "not in a folder", id="dots in disguise"),
    ],
)
def test_adapters_come_from_allowed_folders(
    tmp_path: Path, path: str | None, uri: str | None, status: int, message: str
) -> None:
    """However the path is spelled."""
    for name in ("lora/a", "lorax/a", "other/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lora" / "link").symlink_to(tmp_path / "other" / "a")
    (tmp_path / "lora" / "loop").symlink_to(tmp_path / "lora" / "loop")
    hub_cache(tmp_path / "lora", "org/linked").symlink_to(tmp_path / "other" / "a")
    filled = [text and text.replace("{tmp}", str(tmp_path)) for text in (path, uri)]
    with pytest.raises(OperationError, match=message) as error:
        folder_of(filled[0], filled[1], [str(tmp_path / "lora")])

    assert error.value.status == status


def hub_cache(folder: Path, repository: str) -> Path:
    """Where a cache of the Hugging Face Hub in the folder has the snapshot of a repository's main branch."""
    home = folder / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots").mkdir()
    return home / "snapshots" / ("0" * 40)


def test_an_adapter_of_the_hub_is_taken_from_a_cache(tmp_path: Path) -> None:
    """Of whichever of its names; nothing is fetched."""
    (tmp_path / "empty").mkdir()
    snapshot = make_adapter(hub_cache(tmp_path / "hub", "org/poet"))
    allowed = [str(tmp_path / "empty"), str(tmp_path / "hub")]

    assert folder_of(None, "hf://org/poet", allowed) == snapshot
    assert folder_of(None, f"hf://org/poet@{'0' * 40}", allowed) == snapshot
    assert check(snapshot, LIMITS, allowed).rank == 8
    with pytest.raises(OperationError, match="is in no cache"):
        folder_of(None, "hf://org/poet@v2", allowed)


def test_allowed_folders_may_be_links_and_nothing_is_allowed_by_default(tmp_path: Path) -> None:
    """Scratch folders often are; and a recipe that says nothing opens nothing."""
    (tmp_path / "real" / "a b").mkdir(parents=True)
    (tmp_path / "lora").symlink_to(tmp_path / "real")

    assert folder_of(None, f"file://{tmp_path}/lora/a%20b", [str(tmp_path / "lora")]) == tmp_path / "real" / "a b"
    with pytest.raises(OperationError, match="engine.lora_dirs") as error:
        folder_of(str(tmp_path / "lora"), None, [])
    assert error.value.status == 403


def test_a_file_that_is_a_link_to_outside_is_refused(tmp_path: Path) -> None:
    """The folder alone is not enough."""
    folder = make_adapter(tmp_path / "lora" / "a")
    secret = make_adapter(tmp_path / "other") / "adapter_config.json"
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(secret)
    with pytest.raises(OperationError, match="not in a folder") as error:
        check(folder, LIMITS, [str(tmp_path / "lora")])

    assert error.value.status == 403
