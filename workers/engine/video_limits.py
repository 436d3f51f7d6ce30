"""How much video one request may have decoded: frames that must be passed through, and pixels that are kept.

vLLM 0.32 bounds the size of a frame and, unless a client's `media_io_kwargs` say otherwise, the number of frames that it keeps;
not the length of the video that it decodes to get at them, nor the memory of what it keeps. A file of some MB may have
hours of frames that are all alike.
"""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError

# A quarter of an hour at 24 frames a second; of a picture of 1080p that takes a core about a minute.
MAX_FRAMES = 21_600
MAX_PASSED_PIXELS = MAX_FRAMES * 1920 * 1080
# 32 frames (vLLM's default) of 4K.
MAX_KEPT_BYTES = 32 * 3840 * 2160 * 3
CHANNELS = 3


class BoundedLoader:
    """A video loader of vLLM that looks before it decodes."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_bytes(self, data: bytes, num_frames: int = -1, **options: Any) -> Any:
        """Frames of a video; see VideoLoader.

        Raises:
            VLLMValidationError: There is too much of it.
        """
        check(*shape(data), num_frames)
        return self._loader.load_bytes(data, num_frames=num_frames, **options)


def shape(data: bytes) -> tuple[int, int, int]:
    """Frames, width and height as the file's header has them; vLLM decodes no more than it says.

    Raises:
        ValueError: It is no video.
    """
    import cv2
    from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

    capture = OpenCVVideoBackendMixin.open_video_capture(data)
    try:
        found = (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        frames, width, height = (int(capture.get(which)) for which in found)
        return frames, width, height
    finally:
        capture.release()


def check(frames: int, width: int, height: int, num_frames: int) -> None:
    """Refuse a video that is too much; `num_frames` of it are kept, -1 for all.

    Raises:
        VLLMValidationError: It is.
    """
    pixels = width * height
    if frames > MAX_FRAMES or frames * pixels > MAX_PASSED_PIXELS:
        raise VLLMValidationError(
            f"the video has {frames} frames of {width}x{height}, and may have {MAX_FRAMES} frames and {MAX_PASSED_PIXELS} "
            "pixels in all of them: send a shorter or smaller one",
            parameter="messages",
        )
    kept = min(frames, num_frames) if num_frames > 0 else frames
    if kept * pixels * CHANNELS > MAX_KEPT_BYTES:
        raise VLLMValidationError(
            f"{kept} frames of {width}x{height} are kept of the video, {kept * pixels * CHANNELS} bytes where "
            f"{MAX_KEPT_BYTES} may be: send a smaller one, or ask for fewer with media_io_kwargs",
            parameter="messages",
        )
