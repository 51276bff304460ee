"""Videos as frames, and frames as a video, through OpenCV."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.storage.files import whole_file

if TYPE_CHECKING:
    import numpy as np
    from cv2 import VideoCapture, VideoWriter

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

_CODECS = ("vp09", "mp4v")
"""Of what is written, by preference: browsers play the first."""

_USUAL_RATE = 25.0
"""Frames per second of a video that does not say it."""


def frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, (h, w, 3) uint8 RGB. ValueError when it has none that decodes."""
    video = _opened(path)
    try:
        count = 0
        while True:
            read, frame = video.read()
            if not read:
                break
            count += 1
            yield frame[..., ::-1]
        if not count:
            raise ValueError(f"{path} is a video without frames: OpenCV decodes none; convert it to MP4, or mend it")
    finally:
        video.release()


def _opened(path: Path) -> VideoCapture:
    import cv2

    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong is said in a sentence of ours
    return cv2.VideoCapture(str(path))


def frame_count(path: Path) -> int:
    """How many frames a video says it has; 0 where it does not say."""
    import cv2

    video = _opened(path)
    count = video.get(cv2.CAP_PROP_FRAME_COUNT)
    video.release()
    return max(0, int(count)) if math.isfinite(count) else 0


def frame_rate(path: Path) -> float:
    """Frames per second."""
    import cv2

    video = _opened(path)
    rate = video.get(cv2.CAP_PROP_FPS)
    video.release()
    return float(rate) if math.isfinite(rate) and 0 < rate <= 1000 else _USUAL_RATE


def write_video(path: Path, images: Iterable[np.ndarray], *, rate: float) -> None:
    """Write an MP4 of (h, w, 3) uint8 BGR images of one size, whole or not at all; an odd side grows by a black pixel.

    ValueError where this OpenCV has no codec for it.
    """
    import cv2

    with whole_file(path) as partial:
        shaped = partial.with_name(f"{partial.name}.mp4")  # OpenCV goes by the suffix
        writer: VideoWriter | None = None
        try:
            for image in images:
                height, width = (side + side % 2 for side in image.shape[:2])
                if writer is None:
                    writer = _writer(shaped, rate, (width, height))
                writer.write(cv2.copyMakeBorder(image, 0, height - image.shape[0], 0, width - image.shape[1], 0))
            if writer is None:
                raise ValueError(f"there is no frame for {path}")
            writer.release()
            shaped.replace(partial)
        finally:
            shaped.unlink(missing_ok=True)


def _writer(path: Path, rate: float, size: tuple[int, int]) -> VideoWriter:
    import cv2

    for codec in _CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, size)
        if writer.isOpened():
            return writer
    raise ValueError(
        f"this OpenCV writes no MP4 ({' or '.join(_CODECS)}); install another with: "
        "pip install --force-reinstall opencv-python-headless"
    )
