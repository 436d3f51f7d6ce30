"""Media are fetched and read from where the recipe says and from nowhere else; with vLLM's own decoders."""

from __future__ import annotations

import base64
import io
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from launch.compose import read
from launch.plan import plan
from slurm.places import Place
from tests.films import film
from tests.system.test_media import picture
from workers.engine.arguments import engine_environment

# torch warns of itself while it is imported.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def png(colour: str = "red") -> bytes:
    """A small image."""
    with io.BytesIO() as file:
        Image.new("RGB", (8, 8), colour).save(file, "PNG")
        return file.getvalue()


class Site(BaseHTTPRequestHandler):
    """An image, a way to another host, nothing, and no image; remembers who asked for what."""

    server: ThreadingHTTPServer
    asked: list[str] = []  # noqa: RUF012 - one server in this process

    def do_GET(self) -> None:
        """http.server's name for it."""
        self.asked.append(self.path)
        status, content = {"/x.png": (200, png()), "/moved": (302, b""), "/text": (200, b"no image")}.get(
            self.path, (404, b"")
        )
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://localhost:{self.server.server_port}/x.png")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *unused: Any) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """`127.0.0.1:<port>` of a web server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def as_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that the plan gives an engine."""
    recipe = read(["+recipe=tiny_vlm"]).recipe
    for name, value in engine_environment(recipe, plan(recipe).members[0], Place("127.0.0.1", 20000)).items():
        if "MEDIA" in name:
            monkeypatch.setenv(name, value)


async def fetched(url: str, domains: list[str] | None = None, folder: Path | None = None) -> Any:
    """The image at a URL, by the connector that vLLM's renderer gets in a worker."""
    from vllm import envs
    from vllm.connections import HTTPConnection
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

    import workers.engine.media  # noqa: F401 - importing it puts the connector there

    where = {"allowed_media_domains": domains, "allowed_local_media_path": str(folder or "")}
    connection = HTTPConnection()  # the one that workers share would outlive the test's loop
    connector = MEDIA_CONNECTOR_REGISTRY.load(envs.VLLM_MEDIA_CONNECTOR, connection=connection, **where)
    async with await connection.get_async_client():
        with connection.get_sync_client():
            both = connector.fetch_image(url), await connector.fetch_image_async(url)
    assert both[0].media.tobytes() == both[1].media.tobytes()
    return both[0].media


async def refusal(url: str, domains: list[str] | None = None, folder: Path | None = None) -> str:
    """How the client is told that there is no such image; both ways of fetching alike."""
    from vllm.exceptions import VLLMClientError

    with pytest.raises(VLLMClientError) as error:
        await fetched(url, domains, folder)
    return str(error.value)


async def test_an_allowed_host_is_asked(site: str) -> None:
    """Whatever its port."""
    image = await fetched(f"http://{site}/x.png", ["127.0.0.1"])

    assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("url", "domains"),
    [
        pytest.param("http://{site}/x.png", None, id="none is named"),
        pytest.param("http://{site}/x.png", ["example.com"], id="another is named"),
        pytest.param("HTTP://{site}/x.png", ["example.com"], id="by another spelling"),
        pytest.param("http://example.com@{site}/x.png", ["example.com"], id="the named one as user"),
        pytest.param("http://example.com:80@{site}/x.png", ["example.com"], id="the named one as user with a port"),
        pytest.param("http://{site}\\@example.com/x.png", ["example.com"], id="behind a backslash"),
        pytest.param("http://{site}#@example.com/x.png", ["example.com"], id="behind a fragment"),
        pytest.param("http://example.com.{site}/x.png", ["example.com"], id="the named one in front"),
        pytest.param("http://0x7f000001/x.png", ["example.com"], id="an address in other digits"),
        pytest.param("http://[::1]/x.png", ["example.com"], id="another family"),
        pytest.param("httpx://{site}/x.png", ["127.0.0.1"], id="almost http"),
        pytest.param(" http://{site}/x.png", None, id="behind a space"),
    ],
)
async def test_no_other_host_is_asked(site: str, url: str, domains: list[str] | None) -> None:
    """Not even once."""
    Site.asked.clear()
    await refusal(url.format(site=site), domains)

    assert not Site.asked


async def test_an_allowed_host_cannot_send_us_elsewhere(site: str) -> None:
    """Its redirection is not followed."""
    Site.asked.clear()
    await refusal(f"http://{site}/moved", ["127.0.0.1"])

    assert set(Site.asked) == {"/moved"}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        pytest.param("http://{site}/none", "could not be fetched|HTTP 404", id="nothing there"),
        pytest.param("http://{site}/text", "no medium that can be read", id="no image there"),
        pytest.param("http://127.0.0.1:9/x.png", "could not be fetched", id="nobody there"),
    ],
)
async def test_what_cannot_be_had_is_the_clients_error(site: str, url: str, said: str) -> None:
    """Plain vLLM takes an unreachable host for an error of its own."""
    assert re.search(said, await refusal(url.format(site=site), ["127.0.0.1"]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image, one with another beside it, and a link from here to there."""
    for name in ("allowed", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png())
    (tmp_path / "allowed" / "link.png").symlink_to(tmp_path / "other" / "x.png")
    return tmp_path / "allowed"


async def test_a_file_in_the_allowed_folder_is_read(folder: Path) -> None:
    """Where the recipe names one."""
    assert (await fetched(f"file://{folder}/x.png", folder=folder)).size == (8, 8)


@pytest.mark.parametrize("path", ["/x.png/../../other/x.png", "/../other/x.png", "/%2e%2e/other/x.png", "/link.png"])
async def test_no_other_file_is_read(folder: Path, path: str) -> None:
    """Neither by a path that leads out nor by a link; and none at all where no folder is named."""
    await refusal(f"file://{folder}{path}", folder=folder)

    assert "is not read from files" in await refusal(f"file://{folder}/x.png")


async def test_inline_media_need_no_permission() -> None:
    """What the client sends itself; in any case of letters."""
    content = base64.b64encode(png()).decode()

    assert (await fetched(f"DATA:image/png;base64,{content}")).size == (8, 8)


async def test_a_refusal_does_not_repeat_megabytes() -> None:
    """A broken image of 1 MB comes back as a line."""
    assert len(await refusal(f"data:image/png;base64,{'A' * 1_000_000}")) < 500


def test_what_encoders_made_is_forgotten_oldest_first(tmp_path: Path) -> None:
    """But nothing that was asked for just now."""
    from workers.engine.encoder_cache import prune

    for number in range(4):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 + number, 1000 + number))
    os.utime(tmp_path / "1.safetensors")
    prune(tmp_path, max_bytes=250)
    left = {path.stem for path in tmp_path.iterdir()}
    prune(tmp_path, max_bytes=0)

    assert left == {"1", "3"}
    assert {path.stem for path in tmp_path.iterdir()} == {"1"}


def messages(count: int) -> list[Any]:
    """What vLLM fetches the media of one prompt's messages with, one for each message."""
    from vllm.renderers.chat_utils import AsyncMultiModalItemTracker

    import workers.engine.media  # noqa: F401 - importing it puts the connector there

    config = SimpleNamespace(multimodal_config=None, allowed_local_media_path="", allowed_media_domains=None)
    tracker = AsyncMultiModalItemTracker(config, media_io_kwargs={"video": {"num_frames": 4}})
    return [tracker.create_parser()._connector for _ in range(count)]


async def test_the_videos_of_all_messages_share_a_budget(tmp_path: Path) -> None:
    """As files and as pictures; those of another prompt have their own."""
    from vllm.exceptions import VLLMValidationError

    from workers.engine.video_limits import Budget

    frame = 64 * 48 * 3
    video = f"data:video/mp4;base64,{base64.b64encode(film(tmp_path)).decode()}"
    pictures = "data:video/jpeg;base64," + picture("red", (64, 48), "JPEG").partition(",")[2]
    first, second, third = messages(3)
    first.budget = Budget(9 * frame)

    assert len((await first.fetch_video_async(video)).media[0]) == 4
    assert len(second.fetch_video(pictures).media[0]) == 1
    assert len((await second.fetch_video_async(video)).media[0]) == 4
    for url in (video, pictures):
        with pytest.raises(VLLMValidationError, match=f"where 0 of {9 * frame} are left"):
            await third.fetch_video_async(url)
    assert len((await messages(1)[0].fetch_video_async(video)).media[0]) == 4
