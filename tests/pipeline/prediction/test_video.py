"""Videos become frames, and frames a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.prediction.video import frame_count, frame_rate, frames, write_video


def test_a_video_has_the_frames_that_were_written_at_their_rate(tmp_path: Path) -> None:
    grey = [np.full((64, 96, 3), value, np.uint8) for value in (20, 120, 220)]
    write_video(tmp_path / "v.mp4", grey, rate=10)
    read = list(frames(tmp_path / "v.mp4"))
    assert [frame.shape for frame in read] == [(64, 96, 3)] * 3
    assert [round(float(frame.mean()), -1) for frame in read] == [20, 120, 220]
    assert frame_count(tmp_path / "v.mp4") == 3 and frame_rate(tmp_path / "v.mp4") == 10
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_a_side_of_an_odd_number_of_pixels_grows_by_one(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", [np.zeros((63, 95, 3), np.uint8)], rate=5)
    assert next(frames(tmp_path / "v.mp4")).shape == (64, 96, 3)


def test_a_video_without_frames_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"v\.mp4 is a video without frames"):
        list(frames(tmp_path / "v.mp4"))
