"""Where media of a request may come from: inline always, from a URL only what the recipe allows.

vLLM 0.32 fetches from any address when no domains are named, follows redirects, and takes some bad media for an error of its
own. Its own connector does the work here; this one stands in its place, refuses first, and tells the client what is wrong
with what it sent. Importing this module puts it there.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import requests
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url
from vllm.exceptions import VLLMClientError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal import audio
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.audio import AudioMediaIO
from vllm.multimodal.media.video import VideoMediaIO
from vllm.renderers.chat_utils import AsyncMultiModalContentParser, MultiModalContentParser

from workers.engine.video_limits import BoundedImages, BoundedLoader, Budget

SHOWN_CHARS = 80
# What vLLM reads audio with, and names only when it is missing.
AUDIO_PACKAGES = ("av", "soundfile")
UNREACHABLE = (aiohttp.ClientError, requests.RequestException, asyncio.TimeoutError)


@MEDIA_CONNECTOR_REGISTRY.register("http")  # vLLM's own name for the one it uses when told nothing else
class GuardedConnector(MediaConnector):  # type: ignore[misc]  # mypy does not follow vLLM here
    """vLLM's media connector, closed where the recipe opens nothing.

    http and https want `allowed_media_domains`, file wants `allowed_local_media_path`; both are vLLM's engine arguments.
    Videos of one connector share a budget; there is one connector for each prompt (see `_of_prompt`).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """See MediaConnector."""
        super().__init__(*args, **options)
        self.budget = Budget()

    def load_from_url(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        """See MediaConnector; raises VLLMValidationError or VLLMUnprocessableEntityError, whatever is wrong."""
        self._refuse(url)
        _prepare(media_io, self.budget)
        with _told(url):
            return super().load_from_url(url, media_io, fetch_timeout=fetch_timeout)

    async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        """See MediaConnector; raises VLLMValidationError or VLLMUnprocessableEntityError, whatever is wrong."""
        self._refuse(url)
        _prepare(media_io, self.budget)
        with _told(url):
            return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)

    def _refuse(self, url: str) -> None:
        if url[:5].lower() == "data:":
            return
        try:
            parsed = parse_url(url)
        except LocationParseError as error:
            raise VLLMValidationError(f"{_shown(url)} is no URL", parameter="messages") from error
        if parsed.scheme in ("http", "https"):
            if parsed.hostname not in self.allowed_media_domains:
                raise VLLMValidationError(
                    f"media is not fetched from {parsed.hostname!r}: send it inline as a data: URL, or have the deployment "
                    "launched with engine.args.allowed_media_domains=[<host>, ...]",
                    parameter="messages",
                )
        elif parsed.scheme == "file":
            if self.allowed_local_media_path is None:
                raise VLLMValidationError(
                    "media is not read from files: send it inline as a data: URL, or have the deployment launched with "
                    "engine.args.allowed_local_media_path=<folder>",
                    parameter="messages",
                )
        else:
            raise VLLMValidationError(
                f"{_shown(url)} is no data:, http: or https: URL that media could come from", parameter="messages"
            )


def _of_prompt(made: Callable[[Any], Any]) -> property:
    """A parser's connector: the one that other parsers of the same prompt have.

    vLLM 0.32 makes a parser for each message, and with it a connector, but one tracker for all of a prompt.
    """

    def connector(parser: Any) -> Any:
        kept = vars(parser._tracker)
        if "connector" not in kept:
            kept["connector"] = made(parser)
        return kept["connector"]

    return property(connector)


for parser in (MultiModalContentParser, AsyncMultiModalContentParser):
    parser._connector = _of_prompt(parser._connector.func)

if importlib.util.find_spec("torchaudio") is None:
    # vLLM's choice for every model but one. Without it (it has no build for a CPU-only torch) all audio whose rate is not the
    # model's own would fail.
    audio.resample_audio_torchaudio = audio.resample_audio_pyav


def need_audio() -> None:
    """Say so when this worker cannot read audio at all.

    Raises:
        NotImplementedError: It cannot; vLLM's word for what a server does not do.
    """
    missing = [name for name in AUDIO_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise NotImplementedError(
            f"audio is not read here: the engines' environment lacks {' and '.join(missing)} (pip install av soundfile)"
        )


def _prepare(media_io: Any, budget: Budget) -> None:
    """Bound what decoding may cost, where vLLM does not."""
    if isinstance(media_io, AudioMediaIO):
        need_audio()
    elif isinstance(media_io, VideoMediaIO):  # made anew for each video
        media_io.video_loader = BoundedLoader(media_io.video_loader, budget)
        media_io.image_io = BoundedImages(media_io.image_io, budget)


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn what goes wrong into the client's error: nothing of it is the worker's."""
    try:
        yield
    except VLLMClientError:
        raise
    except UNREACHABLE as error:
        raise VLLMUnprocessableEntityError(
            f"{_shown(url)} could not be fetched ({type(error).__name__})", parameter="messages"
        ) from error
    # Decoders raise anything at all (OSError, zlib.error, struct.error, DecompressionBombError, ...) on a stranger's bytes.
    except Exception as error:
        raise VLLMValidationError(
            f"{_shown(url)} is no medium that can be read: {error}", parameter="messages"
        ) from error


def _shown(url: str) -> str:
    return repr(url if len(url) <= SHOWN_CHARS else f"{url[:SHOWN_CHARS]}...")
