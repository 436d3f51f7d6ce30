"""A model that watches video answers as with plain vLLM's server, its positions (M-RoPE) too; bad video costs only its sender.

The video processors of transformers need torchvision, which has no build for a CPU-only torch. This test takes the Python part
of its wheel from the folder that BATON_TORCHVISION names: docs/multimodal.md says how to make it.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.recipe import Tiny
from launch.tiny_model import make_tiny_model
from tests.deployments import Deployment, deployed
from tests.films import film
from tests.parity import Case, answer
from tests.reference import plain_vllm
from tests.system.test_media import BLUE, RED, asked, goes_on_as_if_not_cut, picture, said, seen
from tests.system.test_resume import pool
from workers.frontend.exchange import Pool

assert pool  # the fixture, over this module's deployment
TORCHVISION = os.environ.get("BATON_TORCHVISION", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.nightly,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not TORCHVISION, reason="BATON_TORCHVISION names no folder with torchvision"),
]

STREAMED = (False, True)
SHAPES = [
    pytest.param(("+recipe=tiny_vlm_encode",), id="encode, prefill and decode apart"),
    pytest.param(("+recipe=tiny_vlm",), id="aggregated"),
]


def watched(content: bytes, form: str = "mp4", **more: Any) -> dict[str, Any]:
    """Video in a message."""
    return linked(f"data:video/{form};base64,{base64.b64encode(content).decode()}", **more)


def linked(url: str | None, **more: Any) -> dict[str, Any]:
    """Video in a message, by its address."""
    return {"type": "video_url", "video_url": None if url is None else {"url": url}, **more}


def jpegs(*colours: str) -> str:
    """A video as pictures, which is vLLM's own way to send one."""
    return "data:video/jpeg;base64," + ",".join(picture(name, form="JPEG").partition(",")[2] for name in colours)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Requests by name, with the status that both servers answer with."""
    folder = tmp_path_factory.mktemp("films")
    dark, light = film(folder), film(folder, shade=200)
    return {
        "text alone": asked("Tell me of the sea"),
        "a video": asked("What happens?", watched(dark)),
        "another": asked("What happens?", watched(light)),
        "a longer one": asked("What happens?", watched(film(folder, frames=60))),
        "AVI": asked("What happens?", watched(film(folder, form="avi"), "avi")),
        "as pictures": asked("What happens?", linked(jpegs("red", "green", "blue", "white"))),
        "an image": asked("What is this?", seen(RED)),
        "a video and an image": asked("Between", watched(dark), "and", seen(BLUE), "what differs?"),
        "video before text": asked(watched(dark), "What happens?"),
        "fewer frames": asked("What happens?", watched(dark), media_io_kwargs={"video": {"num_frames": 2}}, status=400),
        "an earlier turn": said(
            [
                {"role": "user", "content": [watched(dark), {"type": "text", "text": "What happens?"}]},
                {"role": "assistant", "content": "A bar moves."},
                {"role": "user", "content": "Whither?"},
            ]
        ),
        "sampled, n=2": asked("What happens?", watched(dark), n=2, temperature=1.5, seed=11),
        "its token ids": asked("What happens?", watched(dark), return_token_ids=True),
        "no video at all": asked("x", watched(b"no film at all"), status=400),
        "nothing in it": asked("x", watched(b""), status=400),
        "half of one": asked("x", watched(dark[: len(dark) // 2]), status=400),
        "two where one is taken": asked("x", watched(dark), watched(light), status=400),
        "no audio for it": asked(
            "x", {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, status=400
        ),
    }


NAMES = (
    *("text alone", "a video", "another", "a longer one", "AVI", "as pictures", "an image"),
    *("a video and an image", "video before text", "fewer frames", "an earlier turn", "sampled, n=2", "its token ids"),
    *("no video at all", "nothing in it", "half of one", "two where one is taken", "no audio for it"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own model that watches."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny_video", kind=Tiny.VIDEO)


@pytest.fixture(scope="module")
def expected(
    model: Path, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], tuple[int, Any]]:
    """What plain vLLM's server answers; it runs only while it is asked."""
    folder = tmp_path_factory.mktemp("plain-video")
    limits = {"limit_mm_per_prompt": '{"video": 1, "image": 1}'}
    with plain_vllm(model, folder, {"PYTHONPATH": path()}, **limits) as base, httpx.Client(timeout=120) as client:
        return {
            (name, stream): answer(client, base, case, stream) for name, case in cases.items() for stream in STREAMED
        }


@pytest.fixture(scope="module", params=SHAPES)
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path, expected: Any
) -> Iterator[Deployment]:
    """Each shape in turn, after the plain server has ended."""
    shape = (*request.param, f"model.path=tiny-video:{model}", "engine.args.limit_mm_per_prompt={video: 1, image: 1}")
    with deployed(tmp_path_factory.mktemp("video"), *shape, name="video", env={"PYTHONPATH": path()}) as running:
        yield running


def path() -> str:
    """Where Python finds torchvision too."""
    return os.pathsep.join(item for item in (os.environ.get("PYTHONPATH"), TORCHVISION) if item)


@pytest.mark.parametrize("stream", STREAMED, ids=["unary", "streamed"])
@pytest.mark.parametrize("name", NAMES)
def test_it_answers_what_plain_vllm_answers(
    deployment: Deployment, cases: dict[str, Case], expected: Any, name: str, stream: bool
) -> None:
    """Text, reasons, usage with the tokens of video, token ids; what vLLM refuses is refused."""
    found = answer(deployment.http, base(deployment), cases[name], stream)

    assert expected[name, stream][0] == cases[name].status
    assert found == expected[name, stream]


def test_every_case_is_asked(cases: dict[str, Case]) -> None:
    """The names are written down twice, as cases are made with a folder."""
    assert set(NAMES) == set(cases)


def test_answers_follow_the_video(expected: Any) -> None:
    """Else equal answers would prove nothing."""
    names = ("a video", "another", "as pictures", "an image")

    assert len({expected[name, False][1]["choices"][0]["message"]["content"] for name in names}) == len(names)


def test_more_video_than_fits_is_refused_before_it_is_decoded(deployment: Deployment, tmp_path: Path) -> None:
    """A small file may have hours in it; vLLM would decode it all."""
    before = deployment.pids()
    case = asked("x", watched(film(tmp_path, 22_000, (16, 16))))
    refused = deployment.http.post(f"{base(deployment)}{case.path}", json=case.body)

    assert refused.status_code == 400, refused.text
    assert "22000 frames" in refused.json()["error"]["message"]
    assert deployment.pids() == before


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "http://127.0.0.1:1/film.mp4", "ftp://example.com/film.mp4", "data:"]
)
def test_video_comes_from_nowhere_but_where_it_may(deployment: Deployment, url: str) -> None:
    """400; no file is read and nothing fetched."""
    case = asked("x", linked(url))

    assert answer(deployment.http, base(deployment), case, False)[0] == 400


def test_a_video_of_one_frame_is_refused(deployment: Deployment, tmp_path: Path) -> None:
    """Plain vLLM divides by zero, and its server ends."""
    before = deployment.pids()

    assert answer(deployment.http, base(deployment), asked("x", watched(film(tmp_path, frames=1))), False)[0] == 400
    assert deployment.pids() == before


@pytest.mark.parametrize("stream", STREAMED, ids=["unary", "streamed"])
async def test_an_answer_about_a_video_goes_on_as_if_it_had_not_been_cut(
    pool: Pool, cases: dict[str, Case], stream: bool
) -> None:
    """Another worker makes the prompt again, and goes on with the ids so far, at their positions."""
    case = cases["a video"]
    await goes_on_as_if_not_cut(pool, case, stream, (1, 19))


def test_the_cache_of_a_video_really_moves(deployment: Deployment, cases: dict[str, Case]) -> None:
    """Prefill and decode apart: the decode engine pulls what was computed from it."""
    if "decode-0" not in deployment.pids():
        assert "aggregated-0" in deployment.pids()
        return
    before = deployment.metric("decode-0", "vllm:nixl_bytes_transferred_sum")
    told = answer(deployment.http, base(deployment), cases["a longer one"], False)

    assert told[0] == 200
    assert deployment.metric("decode-0", "vllm:nixl_bytes_transferred_sum") > before


def base(deployment: Deployment) -> str:
    """The endpoint without its version."""
    return deployment.endpoint.url.removesuffix("/v1")
