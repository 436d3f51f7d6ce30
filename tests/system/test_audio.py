"""A model that hears answers as with plain vLLM's server, in chats and for transcriptions; bad audio costs only its sender."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import math
import threading
import wave
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError

from launch.recipe import Tiny
from launch.tiny_audio import LONGEST_S, SAMPLE_RATE
from launch.tiny_model import make_tiny_model
from tests.deployments import Deployment, deployed
from tests.parity import Case, answer, joined, plain
from tests.reference import plain_vllm
from tests.system.test_media import asked, goes_on_as_if_not_cut, kept, said, seen
from tests.system.test_resume import pool
from workers.frontend.exchange import Pool

av: Any = pytest.importorskip("av", reason="vLLM reads audio with av and soundfile")
pytest.importorskip("soundfile", reason="vLLM reads audio with av and soundfile")
assert pool  # the fixture, over this module's deployment
pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

MOST = 2
STREAMED = (False, True)
SHAPES = [
    pytest.param(("+recipe=tiny_vlm_disagg",), id="prefill and decode apart"),
    pytest.param(("+recipe=tiny_vlm",), id="aggregated", marks=pytest.mark.nightly),
    pytest.param(("+recipe=tiny_vlm_encode",), id="encode, prefill and decode apart", marks=pytest.mark.nightly),
]


def tone(hertz: int = 440, seconds: float = 1.0, rate: int = SAMPLE_RATE, channels: int = 1) -> bytes:
    """A WAV file of one tone."""
    turn = 2 * math.pi * hertz / rate
    samples = array(
        "h", (int(20_000 * math.sin(turn * at)) for at in range(int(seconds * rate)) for _ in range(channels))
    )
    with io.BytesIO() as file:
        with wave.open(file, "wb") as recording:
            recording.setnchannels(channels)
            recording.setsampwidth(2)
            recording.setframerate(rate)
            recording.writeframes(samples.tobytes())
        return file.getvalue()


def silence(seconds: int, rate: int = SAMPLE_RATE) -> bytes:
    """A WAV file without a sound."""
    with io.BytesIO() as file:
        with wave.open(file, "wb") as recording:
            recording.setnchannels(1)
            recording.setsampwidth(2)
            recording.setframerate(rate)
            recording.writeframes(bytes(2 * rate * seconds))
        return file.getvalue()


def packed(content: bytes, form: str, codec: str) -> bytes:
    """The same sound in another format."""
    with io.BytesIO() as file:
        with av.open(io.BytesIO(content)) as before, av.open(file, "w", format=form) as after:
            stream = after.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
            for frame in before.decode(audio=0):
                after.mux(stream.encode(frame))
            after.mux(stream.encode(None))
        return file.getvalue()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def heard(content: bytes, form: str = "wav") -> dict[str, Any]:
    """Audio in a message, as OpenAI has it."""
    return {"type": "input_audio", "input_audio": {"data": encoded(content), "format": form}}


def linked(url: str | None, **more: Any) -> dict[str, Any]:
    """Audio in a message, by its address."""
    return {"type": "audio_url", "audio_url": None if url is None else {"url": url}, **more}


LOW, HIGH = tone(300), tone(3_000)
LONG = packed(silence(660), "flac", "flac")  # vLLM takes ten minutes
HOST = "AUDIO"  # stands for the address of a server that is not there yet when the cases are written down
CASES: dict[str, Case] = {
    "text alone": asked("Tell me of the sea"),
    "a tone": asked("What is this?", heard(LOW)),
    "another": asked("What is this?", heard(HIGH)),
    "a long one": asked("What is this?", heard(tone(seconds=5.3))),
    "longer than the model takes": asked("What is this?", heard(tone(seconds=LONGEST_S + 3))),
    "in stereo": asked("What is this?", heard(tone(channels=2))),
    "FLAC": asked("What is this?", heard(packed(LOW, "flac", "flac"), "flac")),
    "Ogg": asked("What is this?", heard(packed(HIGH, "ogg", "libopus"), "ogg")),
    "MP4, which only ffmpeg reads": asked("What is this?", heard(packed(LOW, "mp4", "aac"), "mp4")),
    "a data: URL": asked("What is this?", linked(f"data:audio/wav;base64,{encoded(LOW)}")),
    "from a host": asked("What is this?", linked(f"{HOST}/low.wav")),
    "two": asked("Between", heard(LOW), "and", heard(HIGH), "what differs?"),
    "audio before text": asked(heard(LOW), "What is this?"),
    "an earlier turn": said(
        [
            {"role": "user", "content": [heard(LOW), {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "A tone."},
            {"role": "user", "content": "Which?"},
        ]
    ),
    "sampled, n=2": asked("What is this?", heard(LOW), n=2, temperature=1.5, seed=11),
    "its token ids": asked("What is this?", heard(LOW), return_token_ids=True),
    "logprobs": asked("What is this?", heard(LOW), logprobs=True, top_logprobs=2),
    "a wrong name for its format": asked("What is this?", heard(LOW, "mp3")),
    "a format that nobody knows": asked("x", heard(b"no sound at all", "xyz"), status=400),
    "nothing in it": asked("x", heard(b""), status=400),
    "no base64": asked("x", {"type": "input_audio", "input_audio": {"data": "A", "format": "wav"}}, status=400),
    "too many": asked("x", *[heard(LOW)] * (MOST + 1), status=400),
    "an image for a model without eyes": asked("x", seen("data:image/png;base64,AAAA"), status=400),
    "too long with its audio": asked("sea " * 4090, heard(LOW), status=400),
    "minutes in a small file": asked("x", heard(LONG, "flac"), status=400),
    "from a host, and none": asked("x", linked(f"{HOST}/words.wav"), status=400),
}
# What plain vLLM takes for a fault of its own, follows, or (half a header) ends of.
HOSTILE: dict[str, dict[str, Any]] = {
    "half a header": heard(LOW[:30]),
    "a file": linked("file:///etc/hostname"),
    "another host": linked("http://localhost:1/low.wav"),
    "a cloud's own": linked("http://169.254.169.254/latest/meta-data"),
    "another scheme": linked("ftp://127.0.0.1/low.wav"),
    "no URL": linked("http://[::1"),
    "nothing but a name that nobody knows": linked(None, uuid="never heard"),
    "no format": {"type": "input_audio", "input_audio": {"data": encoded(LOW)}},
    "no data": {"type": "input_audio", "input_audio": {"format": "wav"}},
    "a rate of one a second, and so of hours": heard(silence(10_000, rate=1)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A recording to be written down, and the status that both servers answer with."""

    file: bytes | None = LOW
    fields: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    path: str = "transcriptions"


UPLOADS: dict[str, Upload] = {
    "a recording": Upload(),
    "another": Upload(file=HIGH),
    "longer than the model takes at once": Upload(file=tone(seconds=LONGEST_S + 3)),
    "at another rate": Upload(file=tone(rate=8_000)),
    "in stereo": Upload(file=tone(channels=2)),
    "MP4": Upload(file=packed(LOW, "mp4", "aac")),
    "its language": Upload(fields={"language": "de"}),
    "as text": Upload(fields={"response_format": "text"}),
    "sampled": Upload(fields={"temperature": "0.8", "seed": "5", "top_p": "0.9"}),
    "by beams": Upload(fields={"use_beam_search": "true", "n": "2"}),
    "an empty field": Upload(fields={"language": ""}, status=400),
    "a stream": Upload(fields={"stream": "true"}),
    "a stream with its usage": Upload(fields={"stream": "true", "stream_include_usage": "true"}),
    "a stream of several parts": Upload(
        file=tone(seconds=LONGEST_S + 3),
        fields={"stream": "true", "stream_include_usage": "true", "stream_continuous_usage_stats": "true"},
    ),
    "a translation": Upload(path="translations"),
    "a translation into a language": Upload(path="translations", fields={"to_language": "fr"}),
    "a translation as a stream": Upload(path="translations", fields={"stream": "true"}),
    "with times, which the model has not": Upload(fields={"response_format": "verbose_json"}, status=400),
    "as subtitles": Upload(fields={"response_format": "srt"}, status=400),
    "in a form that nobody knows": Upload(fields={"response_format": "runes"}, status=400),
    "in a language that nobody knows": Upload(fields={"language": "xx"}, status=400),
    "of no temperature": Upload(fields={"temperature": "warm"}, status=400),
    "usage of a stream that is none": Upload(fields={"stream_include_usage": "true"}, status=400),
    "beams in a stream": Upload(fields={"use_beam_search": "true", "stream": "true"}, status=400),
    "words": Upload(file=b"no sound at all", status=400),
    "nothing": Upload(file=b"", status=400),
    "half a header": Upload(file=LOW[:30], status=400),
    "no file": Upload(file=None, status=400),
    "for another model": Upload(fields={"model": "nobody"}, status=404),
    "minutes in a small file": Upload(file=LONG, status=400),
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web server with audio."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "low.wav").write_bytes(LOW)
    (folder / "words.wav").write_bytes(b"no sound at all")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own model that hears."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny_audio", kind=Tiny.AUDIO)


Expected = dict[tuple[str, bool], tuple[int, Any]]


@pytest.fixture(scope="module")
def answers(
    model: Path, host: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Expected, dict[str, tuple[int, Any]]]:
    """What plain vLLM's server answers, in chats and to uploads; it runs only while it is asked."""
    folder = tmp_path_factory.mktemp("plain-audio")
    limits = {"limit_mm_per_prompt": f'{{"audio": {MOST}}}', "allowed_media_domains": "127.0.0.1"}
    with plain_vllm(model, folder, **limits) as base, httpx.Client(timeout=120) as client:
        chats = {
            (name, stream): answer(client, base, at(host, case), stream)
            for name, case in CASES.items()
            for stream in STREAMED
        }
        return chats, {name: written(client, base, upload) for name, upload in UPLOADS.items()}


@pytest.fixture(scope="module", params=SHAPES)
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path, answers: Any
) -> Iterator[Deployment]:
    """Each shape in turn, after the plain server has ended."""
    limits = (f"engine.args.limit_mm_per_prompt={{audio: {MOST}}}", "engine.args.allowed_media_domains=[127.0.0.1]")
    shape = (*request.param, f"model.path=tiny-audio:{model}", *limits)
    with deployed(tmp_path_factory.mktemp("audio"), *shape, name="audio") as running:
        yield running


def at(host: str, case: Case) -> Case:
    """The case with the server's address."""
    return Case(case.path, json.loads(json.dumps(case.body).replace(HOST, host)), case.status)


def written(client: httpx.Client, base: str, upload: Upload) -> tuple[int, Any]:
    """Status and content of the answer to an upload, with what may differ left out; a stream is put together again."""
    form = {"model": "tiny", "temperature": "0", "max_completion_tokens": "9", **upload.fields}
    files = {"file": ("sound.wav", upload.file, "audio/wav")} if upload.file is not None else {"other": ("x", b"")}
    response = client.post(f"{base}/v1/audio/{upload.path}", data=form, files=files)
    if response.status_code != 200:
        return response.status_code, None
    if response.headers["content-type"].startswith("application/json"):
        return 200, plain(response.json())
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", response.text
    chunks = [json.loads(line) for line in lines[:-1]]
    for chunk in chunks:
        for choice in chunk["choices"]:
            choice["index"] = 0  # vLLM leaves it out here
    return 200, joined(chunks)


@pytest.mark.parametrize("stream", STREAMED, ids=["unary", "streamed"])
@pytest.mark.parametrize("name", CASES)
def test_it_answers_what_plain_vllm_answers(
    deployment: Deployment, answers: Any, host: str, name: str, stream: bool
) -> None:
    """Text, reasons, usage with the tokens of audio, token ids, logprobs; what vLLM refuses is refused."""
    expected = answers[0][name, stream]
    found = answer(deployment.http, base(deployment), at(host, CASES[name]), stream)

    assert expected[0] == CASES[name].status
    assert found == expected


@pytest.mark.parametrize("name", UPLOADS)
def test_it_writes_down_what_plain_vllm_writes_down(deployment: Deployment, answers: Any, name: str) -> None:
    """Transcriptions and translations, whole and as streams; what vLLM refuses is refused."""
    expected = answers[1][name]
    before = deployment.pids()

    assert expected[0] == UPLOADS[name].status
    assert written(deployment.http, base(deployment), UPLOADS[name]) == expected
    assert deployment.pids() == before


def test_answers_follow_the_sound(answers: Any) -> None:
    """Else equal answers would prove nothing."""
    chats, uploads = answers
    assert chats["a tone", False] != chats["another", False]
    assert uploads["a recording"] != uploads["another"]
    assert uploads["a recording"] != uploads["a translation"]


@pytest.mark.parametrize("name", HOSTILE)
def test_bad_audio_is_refused_and_the_worker_lives_on(deployment: Deployment, name: str) -> None:
    """400, whatever it is; no file is read and nothing fetched."""
    before = deployment.pids()
    body = {"model": "tiny", "messages": [{"role": "user", "content": [HOSTILE[name]]}], "max_tokens": 3}
    refused = deployment.http.post(f"{deployment.endpoint.url}/chat/completions", json=body)

    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert deployment.client.completions.create(model="tiny", prompt="still there", max_tokens=3).choices
    assert deployment.pids() == before


def test_audio_at_any_rate_is_heard(deployment: Deployment) -> None:
    """Plain vLLM without torchaudio fails at every rate but the model's own."""
    status, told = answer(deployment.http, base(deployment), asked("What is this?", heard(tone(rate=8_000))), False)

    assert status == 200, told


def test_an_address_that_gives_nothing_is_told(deployment: Deployment, host: str) -> None:
    """422, as plain vLLM has it."""
    case = asked("x", linked(f"{host}/missing.wav"))

    assert answer(deployment.http, base(deployment), case, False)[0] == 422


def test_the_official_client_writes_recordings_down(deployment: Deployment) -> None:
    """OpenAI's own, whole and streamed, and its errors."""
    audio = deployment.client.audio
    common: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"max_completion_tokens": 9}}
    whole = audio.transcriptions.create(file=("low.wav", LOW), **common)
    with audio.transcriptions.create(file=("low.wav", LOW), stream=True, **common) as stream:
        events = list(stream)
    told: Any = events

    assert whole.text
    assert "".join(choice["delta"]["content"] for event in told for choice in event.choices) == whole.text
    with pytest.deprecated_call():  # in the client, not in the API
        assert audio.translations.create(file=("low.wav", LOW), **common).text != whole.text
    with pytest.raises(BadRequestError):
        audio.transcriptions.create(file=("low.wav", b"no sound"), **common)


def test_what_only_workers_make_is_not_taken_with_a_recording(deployment: Deployment) -> None:
    """Transfer parameters from a client would end the engine (vLLM 0.32)."""
    form = {"model": "tiny", "vllm_xargs": json.dumps({"kv_transfer_params": "x"})}
    before = deployment.pids()
    refused = deployment.http.post(f"{deployment.endpoint.url}/audio/transcriptions", data=form, files={"file": LOW})

    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "kv_transfer_params"
    assert deployment.pids() == before


def test_a_recording_that_is_too_large_is_refused(deployment: Deployment) -> None:
    """Before it is decoded: vLLM's limit of 25 MB."""
    large = Upload(file=LOW + bytes(26 << 20))

    assert written(deployment.http, base(deployment), large)[0] in (400, 413)


@pytest.mark.parametrize("stream", STREAMED, ids=["unary", "streamed"])
async def test_an_answer_about_audio_goes_on_as_if_it_had_not_been_cut(pool: Pool, stream: bool) -> None:
    """Another worker makes the prompt again, and goes on with the ids so far; usage counts each token once."""
    case = asked("What is this?", heard(LOW), max_tokens=20)
    await goes_on_as_if_not_cut(pool, case, stream, (1, 19))


def test_the_cache_of_audio_really_moves(deployment: Deployment) -> None:
    """Prefill and decode apart: the decode engine pulls what was computed from the sound."""
    if "decode-0" not in deployment.pids():
        assert "aggregated-0" in deployment.pids()
        return
    before = deployment.metric("decode-0", "vllm:nixl_bytes_transferred_sum")
    told = answer(deployment.http, base(deployment), asked("Listen " * 100, heard(tone(700))), False)

    assert told[0] == 200
    assert deployment.metric("decode-0", "vllm:nixl_bytes_transferred_sum") > before


def test_audio_is_encoded_where_the_recipe_says(deployment: Deployment) -> None:
    """What an encode engine made of it is what the prompt is computed from."""
    folders = list((deployment.run.path / "encoder_cache").glob("*"))
    if "encode-0" not in deployment.pids():
        assert not folders
        return
    named = linked(f"data:audio/wav;base64,{encoded(LOW)}", uuid="low")

    assert answer(deployment.http, base(deployment), asked("What is this?", named), False)[0] == 200
    assert (folders[0] / kept("low")).exists()


def base(deployment: Deployment) -> str:
    """The endpoint without its version."""
    return deployment.endpoint.url.removesuffix("/v1")
