"""Videos for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def film(folder: Path, frames: int = 8, size: tuple[int, int] = (64, 48), shade: int = 0, form: str = "mp4") -> bytes:
    """A video in which a bar moves over a ground of one shade."""
    import cv2

    path = folder / f"film.{form}"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*{"mp4": "mp4v", "avi": "MJPG"}[form]), 8.0, size)
    for at in range(frames):
        frame = np.full((size[1], size[0], 3), shade, dtype=np.uint8)
        left = at * size[0] // frames
        frame[:, left : left + 8] = 255
        writer.write(frame)
    writer.release()
    return path.read_bytes()
