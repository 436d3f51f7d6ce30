"""How much video one request may have decoded: frames that must be passed through, and pixels that are kept.

vLLM 0.32 bounds the size of a frame and, unless a client's `media_io_kwargs` say otherwise, the number of frames that it keeps;
not the length of the video that it decodes to get at them, nor the memory of what it keeps. A file of some MB may have
hours of frames that are all alike.
"""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

from PIL import Image
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


class BoundedImages:
    """What vLLM reads the frames of a video with that comes as pictures, each of which it bounds by itself only."""

    def __init__(self, images: Any, most_bytes: int = MAX_KEPT_BYTES) -> None:
        self._images = images
        self._left = most_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)

    def load_base64(self, media_type: str, data: str) -> Any:
        """One frame; see MediaIO.

        Raises:
            VLLMValidationError: It is too much, together with those before it.
        """
        with Image.open(BytesIO(base64.b64decode(data))) as frame:  # reads the header alone
            width, height = frame.size
        self._left -= width * height * CHANNELS
        if self._left < 0:
            raise VLLMValidationError(
                f"the video's pictures, the last of {width}x{height}, have {-self._left} bytes more than may be kept: send fewer or "
                "smaller ones",
                parameter="messages",
            )
        return self._images.load_base64(media_type, data)


def shape(data: bytes) -> tuple[int, int, int]:
    """Frames, width and height as the file's header has them; vLLM decodes no more than it says.

    Raises:
        ValueError: It is no video.
    """
    import cv2
    from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

    # Not released by hand: OpenCV 5.0 crashes where that ends the last reference to the bytes. It goes with its name.
    capture = OpenCVVideoBackendMixin.open_video_capture(data)
    found = (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
    frames, width, height = (int(capture.get(which)) for which in found)
    return frames, width, height


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
