"""How much video is decoded: decided before, from what its header says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.films import film
from tests.system.test_media import picture

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.mark.parametrize(
    ("frames", "size", "num_frames", "fits"),
    [
        pytest.param(240, (640, 480), 32, True, id="some seconds"),
        pytest.param(21_600, (1920, 1080), 32, True, id="a quarter of an hour"),
        pytest.param(21_601, (16, 16), 32, False, id="more frames"),
        pytest.param(20_000, (3840, 2160), 32, False, id="more pixels to pass through"),
        pytest.param(32, (3840, 2160), -1, True, id="all of a few"),
        pytest.param(33, (3840, 2160), -1, False, id="all of more"),
        pytest.param(33, (3840, 2160), 32, True, id="some of more"),
        pytest.param(32, (16_000, 9_000), 8, False, id="few that are huge"),
        pytest.param(0, (0, 0), -1, True, id="nothing, which the decoder refuses"),
    ],
)
def test_what_is_too_much_is_refused(frames: int, size: tuple[int, int], num_frames: int, fits: bool) -> None:
    """By the frames that are passed through, and by those that are kept."""
    from vllm.exceptions import VLLMValidationError

    from workers.engine.video_limits import check

    if fits:
        check(frames, *size, num_frames)
        return
    with pytest.raises(VLLMValidationError, match="frames"):
        check(frames, *size, num_frames)


def test_pictures_of_a_video_are_counted_together() -> None:
    """Each is small enough, and the third is one too many; vLLM's own reader gets the others."""
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media import ImageMediaIO

    from workers.engine.video_limits import BoundedImages

    frame = picture("red", (10, 10), "JPEG").partition(",")[2]
    images = BoundedImages(ImageMediaIO(), most_bytes=2 * 10 * 10 * 3)
    read = [images.load_base64("image/jpeg", frame) for _ in range(2)]

    assert [image.media.size for image in read] == [(10, 10)] * 2
    with pytest.raises(VLLMValidationError, match="300 bytes more"):
        images.load_base64("image/jpeg", frame)


def test_the_header_of_a_video_is_read(tmp_path: Path) -> None:
    """What is decided by: frames, width and height."""
    from workers.engine.video_limits import shape

    assert shape(film(tmp_path, frames=24, size=(64, 48))) == (24, 64, 48)
    with pytest.raises(ValueError, match="video"):
        shape(b"no film at all")
