"""How much video is decoded: decided before, from what its header says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.films import film
from tests.system.test_media import picture

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.mark.parametrize(
    ("frames", "size", "fits"),
    [
        pytest.param(240, (640, 480), True, id="some seconds"),
        pytest.param(21_600, (1920, 1080), True, id="a quarter of an hour"),
        pytest.param(21_601, (16, 16), False, id="more frames"),
        pytest.param(20_000, (3840, 2160), False, id="more pixels to pass through"),
        pytest.param(0, (0, 0), True, id="nothing, which the decoder refuses"),
    ],
)
def test_what_is_too_long_is_refused(frames: int, size: tuple[int, int], fits: bool) -> None:
    """By the frames that are passed through."""
    from vllm.exceptions import VLLMValidationError

    from workers.engine.video_limits import check

    if fits:
        check(frames, *size)
        return
    with pytest.raises(VLLMValidationError, match="frames"):
        check(frames, *size)


def kept(loader: str, frames: int, size: tuple[int, int], rate: float = 30.0, num_frames: int = 32) -> int:
    """Frames that a loader keeps of a video, if it may."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
    from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

    from workers.engine.video_limits import Budget, counting

    source = VideoSourceMetadata(frames, rate, frames / rate)
    kind = counting(VIDEO_LOADER_REGISTRY.name2class[loader], Budget(), *size)
    return len(kind.compute_frames_index_to_sample(source=source, target=VideoTargetMetadata(num_frames, 2, 300)))


@pytest.mark.parametrize(
    ("loader", "frames", "size", "most"),
    [
        pytest.param("opencv", 1800, (1920, 1080), 32, id="most models"),
        pytest.param("qwen2_vl", 1800, (1920, 1080), 120, id="Qwen2-VL"),
        pytest.param("qwen3_vl", 1800, (1920, 1080), 120, id="Qwen3-VL"),
        pytest.param("qwen3_vl", 21_600, (1280, 720), 768, id="Qwen3-VL, a quarter of an hour of 720p"),
        pytest.param("opencv_dynamic", 1800, (1920, 1080), 120, id="GLM-4V"),
        pytest.param("glm46v", 900, (1920, 1080), 180, id="GLM-4.6V"),
    ],
)
def test_an_ordinary_clip_may_be_kept(loader: str, frames: int, size: tuple[int, int], most: int) -> None:
    """A minute of 1080p, with each loader as vLLM has it."""
    assert kept(loader, frames, size) == most


@pytest.mark.parametrize("loader", ["qwen2_vl", "qwen3_vl", "opencv_dynamic", "glm46v", "glmga", "glm5next"])
def test_what_is_kept_is_counted_and_not_what_was_asked_for(loader: str) -> None:
    """32 frames of 4K would pass; these loaders keep hundreds, whatever is asked for."""
    from vllm.exceptions import VLLMValidationError

    assert kept("opencv", 5400, (3840, 2160)) == 32
    with pytest.raises(VLLMValidationError, match="frames of 3840x2160 are kept"):
        kept(loader, 5400, (3840, 2160))


def test_more_than_fits_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """By vLLM's own way from the file to the frames; what fits is read as ever, and once only counted."""
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from workers.engine.video_limits import BoundedLoader, Budget

    content, frame = film(tmp_path, frames=40), 64 * 48 * 3  # five seconds, two frames of each
    for name in ("qwen2_vl", "embedding_gemma2"):
        loader = VIDEO_LOADER_REGISTRY.load(name)
        plain, metadata = loader.load_bytes(content, num_frames=2, fps=2)
        again, same = BoundedLoader(loader, Budget(10 * frame)).load_bytes(content, num_frames=2, fps=2)
        assert (again == plain).all()
        assert (len(again), same) == (10, metadata)
        with pytest.raises(VLLMValidationError, match="10 frames of 64x48"):
            BoundedLoader(loader, Budget(10 * frame - 1)).load_bytes(content, num_frames=2, fps=2)


def test_frames_that_only_a_scan_finds_are_counted() -> None:
    """torchcodec's, whatever the header said."""
    from vllm.exceptions import VLLMValidationError

    assert kept("opencv", 21_600, (16, 16)) == 32
    with pytest.raises(VLLMValidationError, match="21601 frames"):
        kept("opencv", 21_601, (16, 16))


@pytest.mark.parametrize("recovery", [False, True])
def test_a_frame_is_as_large_as_it_was_counted(tmp_path: Path, recovery: bool) -> None:
    """Also with frame_recovery, by which vLLM keeps frames of any size."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from workers.engine.video_limits import BoundedLoader, Budget, counting

    loader, content = VIDEO_LOADER_REGISTRY.load("opencv"), film(tmp_path)
    frames, _ = BoundedLoader(loader, Budget()).load_bytes(content, num_frames=4, frame_recovery=recovery)

    assert frames.shape == (4, 48, 64, 3)
    with pytest.raises(ValueError, match="a frame of 64x48 in a video of 32x48"):
        counting(type(loader), Budget(), 32, 48)().load_bytes(content, num_frames=4, frame_recovery=recovery)


def test_of_a_loader_that_does_not_say_all_frames_count(tmp_path: Path) -> None:
    """One that a plugin brought."""
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.video import VideoLoader

    from workers.engine.video_limits import BoundedLoader, Budget

    class Silent(VideoLoader):  # type: ignore[misc]  # mypy does not follow vLLM here
        @classmethod
        def load_bytes(cls, data: bytes, **options: object) -> str:
            """Something."""
            return "frames"

    content, frame = film(tmp_path, frames=24), 64 * 48 * 3

    assert BoundedLoader(Silent(), Budget(24 * frame)).load_bytes(content) == "frames"
    with pytest.raises(VLLMValidationError, match="24 frames"):
        BoundedLoader(Silent(), Budget(24 * frame - 1)).load_bytes(content)


def test_pictures_of_a_video_are_counted_together() -> None:
    """Each is small enough, and the third is one too many; vLLM's own reader gets the others."""
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media import ImageMediaIO

    from workers.engine.video_limits import BoundedImages, Budget

    frame = picture("red", (10, 10), "JPEG").partition(",")[2]
    images = BoundedImages(ImageMediaIO(), Budget(2 * 10 * 10 * 3))
    read = [images.load_base64("image/jpeg", frame) for _ in range(2)]

    assert [image.media.size for image in read] == [(10, 10)] * 2
    with pytest.raises(VLLMValidationError, match="300 bytes where 0 of 600 are left"):
        images.load_base64("image/jpeg", frame)


def test_the_header_of_a_video_is_read(tmp_path: Path) -> None:
    """What is decided by: frames, width and height."""
    from workers.engine.video_limits import shape

    assert shape(film(tmp_path, frames=24, size=(64, 48))) == (24, 64, 48)
    with pytest.raises(ValueError, match="video"):
        shape(b"no film at all")
