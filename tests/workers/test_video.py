"""Video in a prompt that a worker makes: with vLLM's own renderer and decoders, but without an engine.

The video processors of transformers need torchvision, which has no build for a CPU-only torch: docs/multimodal.md says how its Python
part is put on the PYTHONPATH. Without it these tests are left out.
"""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from launch.recipe import Tiny
from launch.tiny_model import make_tiny_model
from tests.films import film
from tests.system.test_media import BLUE, RED, asked, picture, seen
from workers.engine.base import Ask, RefusedError
from workers.engine.options import ServingOptions
from workers.runtime import wire

pytest.importorskip("torchvision", reason="video processors need torchvision", exc_type=ImportError)
pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


def linked(url: str) -> dict[str, Any]:
    """Video in a message, by its address."""
    return {"type": "video_url", "video_url": {"url": url}}


def watched(content: bytes, form: str = "mp4") -> dict[str, Any]:
    """Video in a message."""
    return linked(f"data:video/{form};base64,{base64.b64encode(content).decode()}")


@pytest.fixture(scope="module")
def rendering(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A worker's, over the project's own model that watches."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.renderers import renderer_from_config

    from workers.engine.rendering import Rendering

    model = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny_video", kind=Tiny.VIDEO)
    limits = {"video": 1, "image": 1}
    config = AsyncEngineArgs(
        model=str(model), dtype="float32", max_model_len=4096, enforce_eager=True, limit_mm_per_prompt=limits
    ).create_engine_config()
    llm = SimpleNamespace(model_config=config.model_config, renderer=renderer_from_config(config))
    return Rendering(llm, ServingOptions(), passes_on=True)


def rendered(rendering: Any, *parts: Any, **more: Any) -> Ask:
    """The prefill leg of a chat."""
    body = asked(*parts, **more).body
    source = msgspec.json.encode({"messages": body.pop("messages")})
    shape = wire.Render(wire.Shape.CHAT, False, False, "{", "}", 0)
    leg = Ask(
        request_id="r",
        prompt=[],
        render=shape,
        options=msgspec.json.encode(body),
        max_tokens=8,
        prefill_only=True,
        source=source,
    )
    made: Ask = asyncio.run(rendering.rendered(leg))
    return made


def jpegs(*colours: str) -> dict[str, Any]:
    """A video as pictures, which is vLLM's own way to send one."""
    return linked(
        "data:video/jpeg;base64," + ",".join(picture(name, form="JPEG").partition(",")[2] for name in colours)
    )


def test_video_becomes_tokens_and_features_that_travel(rendering: Any, tmp_path: Path) -> None:
    """More of them for more frames; the later legs get back what was processed."""
    from workers.engine.rendering import unpack

    short = rendered(rendering, "What happens?", watched(film(tmp_path)))
    long = rendered(rendering, "What happens?", watched(film(tmp_path, frames=60)))
    both = rendered(rendering, "What happens?", watched(film(tmp_path)), seen(RED))

    assert len(long.prompt) > len(short.prompt)
    for made, kinds in ((short, {"video": 1}), (long, {"video": 1}), (both, {"video": 1, "image": 1})):
        back = unpack(made.features, made.prompt)
        assert {kind: len(items) for kind, items in back["mm_kwargs"].items()} == kinds
        assert back["mm_hashes"] == made.inputs["mm_hashes"]
        assert back["prompt_token_ids"] == made.prompt


def test_the_format_does_not_matter(rendering: Any, tmp_path: Path) -> None:
    """AVI, and pictures one by one."""
    assert rendered(rendering, "x", watched(film(tmp_path, form="avi"), "avi")).features
    assert rendered(rendering, "x", jpegs("red", "green", "blue", "white")).features


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda folder: [watched(b"no film at all")], id="no video"),
        pytest.param(lambda folder: [watched(b"")], id="nothing"),
        pytest.param(lambda folder: [watched(film(folder)[:700])], id="half of one"),
        pytest.param(lambda folder: [watched(film(folder, 1))], id="one frame, by which vLLM divides by zero"),
        pytest.param(lambda folder: [watched(film(folder)), watched(film(folder, 4))], id="two where one is taken"),
        pytest.param(lambda folder: [watched(film(folder, 22_000, (16, 16)))], id="hours of frames that are all alike"),
        pytest.param(lambda folder: [linked("data:video/jpeg;base64,AAAA")], id="no picture"),
        pytest.param(lambda folder: [linked("file:///etc/hostname")], id="a file"),
        pytest.param(lambda folder: [linked("http://127.0.0.1:1/film.mp4")], id="a host"),
        pytest.param(lambda folder: [seen(RED), seen(BLUE)], id="two images where one is taken"),
    ],
)
def test_bad_video_is_the_clients_fault(rendering: Any, tmp_path: Path, content: Any) -> None:
    """And costs nobody anything."""
    with pytest.raises(RefusedError) as refused:
        rendered(rendering, "x", *content(tmp_path))

    assert refused.value.status == 400


def test_a_client_may_not_say_how_much_is_decoded(rendering: Any, tmp_path: Path) -> None:
    """vLLM's own default, which a recipe may change (trust_request_mm_kwargs)."""
    with pytest.raises(RefusedError, match="media_io_kwargs"):
        rendered(rendering, "x", watched(film(tmp_path)), media_io_kwargs={"video": {"num_frames": -1}})
