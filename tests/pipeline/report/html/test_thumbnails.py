from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.loader.val_images import ValImage
from pipeline.evaluation.overlays import write_overlay
from pipeline.evaluation.predict import Predictions
from pipeline.report.html.thumbnails import PAGE_MIB, PANEL_KIB, panel_limit, panels


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_overlay_is_shown_as_its_three_panels_within_a_limit() -> None:
    # Three panels of 120 x 80 noise with 4 white columns between them: 120 + 4 + 120 + 4 + 120 = 368.
    noise = np.random.default_rng(0).integers(0, 256, (80, 368, 3), dtype=np.uint8)
    shown = panels(png(noise), 3000)
    assert len(shown) == 3
    for uri in shown:
        data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
        assert len(data) <= 3000
        width, height = Image.open(io.BytesIO(data)).size
        assert width < 120 and width / height == pytest.approx(1.5, abs=0.1)


def test_panels_are_those_that_evaluation_joins(tmp_path: Path) -> None:
    val_image = ValImage(
        image=torch.full((3, 40, 60), 200, dtype=torch.uint8),
        original_size=(40, 60),
        label_map=torch.zeros(40, 60, dtype=torch.uint8),
        segments=None,
        labels=torch.zeros(0, dtype=torch.int64),
        crowd=torch.zeros(0, dtype=torch.bool),
        instances=None,
        original=None,
        name="grey",
        index=0,
    )
    predictions = Predictions(labels=torch.ones(40, 60, dtype=torch.int64))
    write_overlay(tmp_path / "o.png", val_image, predictions, 2)
    shown = panels((tmp_path / "o.png").read_bytes(), 10_000)
    assert [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size for uri in shown] == [(60, 40)] * 3


def test_a_picture_that_is_no_overlay_is_shown_whole_and_no_picture_is_an_error() -> None:
    assert len(panels(png(np.zeros((5, 7, 3), np.uint8)), 1000)) == 1  # 7 - 2 * 4 < 1
    with pytest.raises(ValueError, match="it is no image"):
        panels(b"text", 1000)


def test_pictures_share_the_limit_of_the_page() -> None:
    # 100 panels have room for 60 KiB each (6,000 of 8,192 KiB); 819.2 have 10 KiB each.
    assert panel_limit(100) == PANEL_KIB * 1024
    assert panel_limit(8192) == PAGE_MIB * 2**20 / 8192 == 1024
