"""How much video a prompt may have decoded: frames of each that must be passed through, and pixels that are kept of all.

vLLM 0.32 bounds the size of a frame, and its loaders bound, each in its own way, the number of frames that they keep; not the length
of the video that is decoded to get at them, nor the memory of what is kept. A file of some MB may have hours of frames that
are all alike.
"""

from __future__ import annotations

import base64
import threading
from io import BytesIO
from typing import Any

from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.video import VideoLoader

# A quarter of an hour at 24 frames a second; of a picture of 1080p that takes a core about a minute.
MAX_FRAMES = 21_600
MAX_PASSED_PIXELS = MAX_FRAMES * 1920 * 1080
# What the loaders of Qwen2-VL and Qwen3-VL keep at most, 768 frames, in 720p; 341 frames of 1080p (at their 2 a second almost three
# minutes), 85 of 4K.
MAX_KEPT_BYTES = 768 * 1280 * 720 * 3
CHANNELS = 3


class Budget:
    """Bytes of frames that may still be kept of a prompt's videos, which take from it in threads of their own."""

    def __init__(self, most_bytes: int = MAX_KEPT_BYTES) -> None:
        self._most = self._left = most_bytes
        self._lock = threading.Lock()

    def take(self, frames: int, width: int, height: int) -> None:
        """Note that so many frames are kept.

        Raises:
            VLLMValidationError: They are too many; nothing was taken.
        """
        wanted = frames * width * height * CHANNELS
        with self._lock:
            if wanted > self._left:
                raise VLLMValidationError(
                    f"{frames} frames of {width}x{height} are kept of a video, {wanted} bytes where {self._left} of {self._most} "
                    "are left: send fewer, shorter or smaller videos",
                    parameter="messages",
                )
            self._left -= wanted


class BoundedLoader:
    """A video loader of vLLM that looks before it decodes."""

    def __init__(self, loader: Any, budget: Budget) -> None:
        self._loader = loader
        self._budget = budget

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_bytes(self, data: bytes, **options: Any) -> Any:
        """Frames of a video; see VideoLoader.

        Raises:
            VLLMValidationError: There is too much of it.
        """
        frames, width, height = shape(data)
        check(frames, width, height)
        kind = type(self._loader)
        if not _chooses(kind):
            self._budget.take(frames, width, height)
        return counting(kind, self._budget, width, height)().load_bytes(data, **options)


def counting(kind: Any, budget: Budget, width: int, height: int) -> Any:
    """A class of loaders like `kind` for one video, which take from the budget once they know what they keep.

    How many frames that are is each loader's own affair: those of Qwen and GLM go by the seconds of the video, up to some
    hundreds, whatever `num_frames` says. Each of vLLM's decoders asks the class that loads, and decodes after that.
    """
    taken = 0

    class Counting(kind):  # type: ignore[misc]  # whichever vLLM chose for the model
        @classmethod
        def compute_frames_index_to_sample(cls, source: Any, target: Any, **options: Any) -> Any:
            """See VideoLoader; some loaders ask twice."""
            nonlocal taken
            check(
                source.total_frames_num, width, height
            )  # a decoder that scans the file may find more than its header says
            kept = super().compute_frames_index_to_sample(source, target, **options)
            if len(kept) > taken:
                budget.take(len(kept) - taken, width, height)
                taken = len(kept)
            return kept

        @classmethod
        def read_frames(cls, cap: Any, *args: Any, **options: Any) -> Any:
            """See VideoLoader; OpenCV's way only."""
            return super().read_frames(Steady(cap, width, height), *args, **options)

    return Counting


class Steady:
    """OpenCV's capture, as long as its frames have the size that was counted.

    The size may change within a video. vLLM writes frames into an array of the header's size, where another fails; but with
    `frame_recovery` it keeps them as they come.
    """

    def __init__(self, capture: Any, width: int, height: int) -> None:
        self._capture = capture
        self._shape = (height, width)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._capture, name)

    def retrieve(self) -> Any:
        """See cv2.VideoCapture.

        Raises:
            ValueError: The frame has another size.
        """
        found, frame = self._capture.retrieve()
        if found and frame.shape[:2] != self._shape:
            raise ValueError(
                f"a frame of {frame.shape[1]}x{frame.shape[0]} in a video of {self._shape[1]}x{self._shape[0]}"
            )
        return found, frame


def _chooses(kind: Any) -> bool:
    """Whether a loader says which frames it keeps; vLLM's own all do, and of one that does not, all frames are counted."""
    chosen = getattr(kind, "compute_frames_index_to_sample", None)
    return getattr(chosen, "__func__", None) not in (None, VideoLoader.compute_frames_index_to_sample.__func__)


class BoundedImages:
    """What vLLM reads the frames of a video with that comes as pictures, each of which it bounds by itself only."""

    def __init__(self, images: Any, budget: Budget) -> None:
        self._images = images
        self._budget = budget

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)

    def load_base64(self, media_type: str, data: str) -> Any:
        """One frame; see MediaIO.

        Raises:
            VLLMValidationError: It is too much, together with those before it.
        """
        with Image.open(BytesIO(base64.b64decode(data))) as frame:  # reads the header alone
            width, height = frame.size
        self._budget.take(1, width, height)
        return self._images.load_base64(media_type, data)


def shape(data: bytes) -> tuple[int, int, int]:
    """Frames, width and height as the file's header has them, by OpenCV.

    vLLM's OpenCV decoder goes no further than it says. Others (torchcodec, PyNvVideoCodec, DeepStream, which only a recipe brings)
    count frames by themselves, and are checked again when they have (`counting`); their frames are taken to be of this size, which
    a file with several streams may belie, up to vLLM's own limit for a frame.

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


def check(frames: int, width: int, height: int) -> None:
    """Refuse a video that is too long to be passed through.

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
