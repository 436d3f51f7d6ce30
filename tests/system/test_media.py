"""A model that sees images answers as with plain vLLM's server, and bad media cost nobody but their sender anything."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from launch.recipe import Tiny
from launch.tiny_model import make_tiny_model
from tests.deployments import Deployment, deployed, targets
from tests.parity import CASES as TEXTS
from tests.parity import CHAT, Case, answer
from tests.reference import plain_vllm
from tests.system.test_resume import HEAD, Recorder, client_sees, counted, pool
from workers.frontend.exchange import Pool, Question
from workers.frontend.exchange import answer as ask
from workers.frontend.openai import options
from workers.frontend.sources import source
from workers.runtime import wire

assert pool  # the fixture, over this module's deployment
pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MOST_IMAGES = 3
# In the first, workers also make the prompts that have no media.
SHAPES = [
    pytest.param(
        ("+recipe=tiny_vlm_encode", "engine.tokenize=worker", "engine.canary_interval_s=1"),
        id="encode, prefill and decode apart",
    ),
    pytest.param(("+recipe=tiny_vlm",), id="aggregated", marks=pytest.mark.nightly),
    pytest.param(("+recipe=tiny_vlm_disagg",), id="prefill and decode apart", marks=pytest.mark.nightly),
]


def picture(colour: str = "red", size: tuple[int, int] = (64, 64), form: str = "PNG", mode: str = "RGB") -> str:
    """An image of one colour with a stripe, as a data: URL."""
    image = Image.new(mode, size, colour)
    image.paste(Image.new(mode, (4, size[1]), "white"), (size[0] // 2, 0))
    with io.BytesIO() as file:
        image.save(file, form)
        return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def seen(url: str | None, **more: Any) -> dict[str, Any]:
    """An image in a message."""
    return {"type": "image_url", "image_url": None if url is None else {"url": url}, **more}


def asked(*parts: Any, status: int = 200, **more: Any) -> Case:
    """A greedy chat of 12 tokens; texts may be written plainly."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return said([{"role": "user", "content": content}], status=status, **more)


def said(messages: list[dict[str, Any]], status: int = 200, **more: Any) -> Case:
    """The same for a whole conversation."""
    common = {"model": "tiny", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return Case(CHAT, {**common, "messages": messages, **more}, status)


WITHOUT_IMAGES = (
    *("greedy", "token ids", "several prompts", "no begin token", "echo", "echo of token ids", "echo with logprobs"),
    *(
        "stop and min_tokens",
        "echo alone",
        "echo alone with logprobs",
        "stop string",
        "developer role",
        "chat token ids out",
        "json schema",
        "token out of vocabulary",
    ),
)
RED, BLUE = picture("red"), picture("blue")
CASES: dict[str, Case] = {
    "text alone": asked("Tell me of the sea"),
    "an image": asked("What is this?", seen(RED)),
    "another": asked("What is this?", seen(BLUE)),
    "a wide one": asked("What is this?", seen(picture(size=(120, 20)))),
    "a tall one": asked("What is this?", seen(picture(size=(30, 200)))),
    "a JPEG": asked("What is this?", seen(picture(form="JPEG"))),
    "a GIF": asked("What is this?", seen(picture(form="GIF", mode="RGB"))),
    "one with transparency": asked("What is this?", seen(picture(mode="RGBA"))),
    "image before text": asked(seen(RED), "What is this?"),
    "two images": asked("Between", seen(RED), "and", seen(BLUE), "what differs?"),
    "the same twice": asked(seen(RED), seen(RED), "What differs?"),
    "an earlier turn": said(
        [
            {"role": "user", "content": [seen(RED), {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "A wall."},
            {"role": "user", "content": "Which colour?"},
        ]
    ),
    "named by the client": asked("What is this?", seen(RED, uuid="the-wall")),
    "sampled, n=2": asked("What is this?", seen(RED), n=2, temperature=1.5, seed=11),
    "its token ids": asked("What is this?", seen(RED), return_token_ids=True),
    "logprobs": asked("What is this?", seen(RED), logprobs=True, top_logprobs=2),
    "a stop string": asked("What is this?", seen(BLUE), stop=["e"]),
    "salted": asked("What is this?", seen(RED), cache_salt="mine"),
    **{name: TEXTS[name] for name in WITHOUT_IMAGES},
    "too many images": asked(*[seen(RED)] * (MOST_IMAGES + 1), status=400),
    "no image at all": asked("x", seen("data:image/png;base64,AAAA"), status=400),
    "no base64": asked("x", seen("data:image/png;base64,A"), status=400),
    "half an image": asked("x", seen(RED[: len(RED) // 2 // 4 * 4]), status=400),
    "an unknown kind of part": asked("x", {"type": "smell"}, status=400),
    "audio for a model without ears": asked(
        "x", {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, status=400
    ),
    "too long with its images": asked("sea " * 4090, seen(RED), status=400),
}
# What plain vLLM takes for a fault of its own, follows, or (the local file) dies of.
HOSTILE: dict[str, dict[str, Any]] = {
    "a file": seen("file:///etc/hostname"),
    "a file by another name": seen("FILE://localhost/etc/hostname"),
    "an address inside": seen("http://127.0.0.1:1/x.png"),
    "a cloud's own": seen("http://169.254.169.254/latest/meta-data"),
    "another scheme": seen("ftp://example.com/x.png"),
    "no base64 asked for": seen("data:image/png,AAAA"),
    "no data": seen("data:"),
    "no URL": seen("http://[::1"),
    "a video's address": {"type": "video_url", "video_url": {"url": "http://127.0.0.1:1/x.mp4"}},
    "more pixels than fit": seen(picture(size=(40000, 5000), mode="1", colour="black")),
    "nothing but a name that nobody knows": seen(None, uuid="never seen"),
}


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own model that sees."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny_vlm", kind=Tiny.VISION)


@pytest.fixture(scope="module")
def expected(vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[int, Any]]:
    """What plain vLLM's server answers; it runs only while it is asked."""
    folder = tmp_path_factory.mktemp("plain-media")
    limit = {"limit_mm_per_prompt": f'{{"image": {MOST_IMAGES}}}'}
    with plain_vllm(vision_model, folder, **limit) as base, httpx.Client(timeout=120) as http:
        return {(name, stream): answer(http, base, case, stream) for name, case in CASES.items() for stream in STREAMED}


STREAMED = (False, True)


@pytest.fixture(scope="module", params=SHAPES)
def deployment(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    vision_model: Path,
    expected: dict[tuple[str, bool], tuple[int, Any]],
) -> Iterator[Deployment]:
    """Each shape in turn, after the plain server has ended."""
    limit = f"engine.args.limit_mm_per_prompt={{image: {MOST_IMAGES}}}"
    shape = (*request.param, f"model.path=tiny-vision:{vision_model}", limit)
    with deployed(tmp_path_factory.mktemp("media"), *shape, name="media") as running:
        yield running


@pytest.mark.parametrize("stream", STREAMED, ids=["unary", "streamed"])
@pytest.mark.parametrize("name", CASES)
def test_it_answers_what_plain_vllm_answers(
    deployment: Deployment, expected: dict[tuple[str, bool], tuple[int, Any]], name: str, stream: bool
) -> None:
    """Text, reasons, usage with the tokens of images, token ids, logprobs; what vLLM refuses is refused."""
    case = CASES[name]
    found = answer(deployment.http, deployment.endpoint.url.removesuffix("/v1"), case, stream)

    assert expected[name, stream][0] == case.status
    assert found == expected[name, stream]


def test_answers_follow_the_image(expected: dict[tuple[str, bool], tuple[int, Any]]) -> None:
    """Else equal answers would prove nothing."""
    texts = {expected[name, False][1]["choices"][0]["message"]["content"] for name in ("an image", "another")}

    assert len(texts) == 2


@pytest.mark.parametrize("name", HOSTILE)
def test_bad_media_are_refused_and_the_worker_lives_on(deployment: Deployment, name: str) -> None:
    """400, whatever they are; no file is read and nothing fetched."""
    before = deployment.pids()
    body = {"model": "tiny", "messages": [{"role": "user", "content": [HOSTILE[name]]}], "max_tokens": 3}
    refused = deployment.http.post(f"{deployment.endpoint.url}/chat/completions", json=body)

    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert deployment.client.completions.create(model="tiny", prompt="still there", max_tokens=3).choices
    assert deployment.pids() == before


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        pytest.param("chat/completions", {"messages": []}, id="no messages"),
        pytest.param("chat/completions", {"messages": [{"content": "hello"}]}, id="no role"),
        pytest.param("completions", {"prompt": [[]]}, id="no ids"),
        pytest.param("completions", {"prompt": [""], "add_special_tokens": False}, id="no text"),
        pytest.param("completions", {"prompt": [[2**40]]}, id="ids that do not exist"),
    ],
)
def test_prompts_of_nothing_are_refused(deployment: Deployment, path: str, prompt: dict[str, Any]) -> None:
    """Whoever makes them."""
    refused = deployment.http.post(
        f"{deployment.endpoint.url}/{path}", json={"model": "tiny", "max_tokens": 3, **prompt}
    )

    assert refused.status_code == 400, refused.text


def test_media_that_were_named_need_not_be_sent_again(deployment: Deployment) -> None:
    """vLLM's `uuid`: the second request carries the name alone."""
    name = "seen before"
    base = deployment.endpoint.url.removesuffix("/v1")
    first = answer(deployment.http, base, asked("What is this?", seen(BLUE, uuid=name)), False)
    second = answer(deployment.http, base, asked("What is this?", seen(None, uuid=name)), False)

    assert first[0] == 200
    assert second == first


async def goes_on_as_if_not_cut(pool: Pool, case: Case, stream: bool, cuts: Sequence[int]) -> None:
    """Cut the answer to a chat after so many tokens: another worker makes the prompt again, and goes on with the ids so far; the
    client sees the same, and usage counts each token once."""
    question = Question(
        request_id=f"cut-{stream}",
        prompt=b"",
        source=source(messages=case.body["messages"]),
        media=True,
        render=wire.Render(wire.Shape.CHAT, stream, False, HEAD, "}", 0),
        options=options(case.body),
        max_tokens=20,
    )
    whole = Recorder()
    last = await ask(pool, question, whole)
    expected = client_sees(whole.data + last.data, stream)
    for cut in cuts:
        ids, told = whole.after(cut)
        rest = Recorder(ids)
        end = await ask(pool, question, rest)

        assert client_sees(told + rest.data + end.data, stream) == expected, cut
        assert counted(end) == counted(last)


@pytest.mark.parametrize("stream", STREAMED, ids=["unary", "streamed"])
async def test_an_answer_about_an_image_goes_on_as_if_it_had_not_been_cut(pool: Pool, stream: bool) -> None:
    """Another worker makes the prompt again, and goes on with the ids so far; usage counts each token once."""
    case = asked("What is this?", seen(RED), max_tokens=20)
    await goes_on_as_if_not_cut(pool, case, stream, (1, 7, 19))


def test_media_are_encoded_where_the_recipe_says(deployment: Deployment) -> None:
    """What an encode engine made is what the prompt is computed from: with another image's in its place, that one is seen."""
    folders = list((deployment.run.path / "encoder_cache").glob("*"))
    if "encode-0" not in deployment.pids():
        assert not folders
        return
    base = deployment.endpoint.url.removesuffix("/v1")

    def tell(url: str, name: str) -> Any:
        return answer(deployment.http, base, asked("Describe it", seen(url, uuid=name)), False)

    blue, red = tell(BLUE, "blue"), tell(RED, "red")
    (folder,) = folders
    shutil.copy(folder / kept("blue"), folder / kept("planted"))

    assert tell(RED, "planted") == blue
    assert red != blue
    assert tell(RED, "../../../escaped") == red  # vLLM's own connector would make a folder of that name
    assert (folder / kept("../../../escaped")).exists()


def kept(name: str) -> str:
    """The file of an image that the client has named."""
    return f"{hashlib.sha256(name.encode()).hexdigest()}.safetensors"


def test_an_engine_that_only_encodes_answers_canaries(deployment: Deployment) -> None:
    """It produces no token, and is watched like any other."""
    if "encode-0" not in deployment.pids():
        assert "encode-0" not in {item["labels"]["member"] for item in targets(deployment.run)}
        return
    asked = time.monotonic()
    while not deployment.metric("encode-0", "baton_worker_canaries_total", result="answered"):
        assert time.monotonic() - asked < 20
        time.sleep(0.1)

    assert deployment.metric("encode-0", "baton_worker_canaries_total", result="failed") == 0


def test_the_cache_of_an_image_really_moves(deployment: Deployment) -> None:
    """Prefill and decode apart: the decode engine pulls what was computed from the image, and nothing is computed twice."""
    if "decode-0" not in deployment.pids():
        assert "aggregated-0" in deployment.pids()
        return

    def computed_locally() -> list[str]:
        page = deployment.http.get(f"{deployment.endpoint.url.removesuffix('/v1')}/metrics").text
        return [line for line in page.splitlines() if line.startswith("baton_frontend_local_prefills_total{")]

    local = computed_locally()
    before = deployment.metric("decode-0", "vllm:nixl_bytes_transferred_sum")
    image = seen(picture("green", (64, 64)))
    told = answer(deployment.http, deployment.endpoint.url.removesuffix("/v1"), asked("Look " * 100, image), False)

    assert told[0] == 200
    assert deployment.metric("decode-0", "vllm:nixl_bytes_transferred_sum") > before
    assert computed_locally() == local
