"""How much video is decoded: decided before, from what its header says."""

from __future__ import annotations

import pytest

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
