from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.images.codecs import decode_image
from pipeline.data.images.draw import class_colours
from pipeline.data.shards.sample_sheet import sample_places
from pipeline.storage.files import sha256
from tests.helpers.images import encoded, put, write_folder
from tests.helpers.shard_folders import build


def test_samples_are_spread_over_the_shards() -> None:
    # 8 of 15 records: 0, 2, 4, ... 14, in shards that begin at 0, 5 and 10
    assert sample_places([5, 5, 5]) == [(0, 0), (0, 2), (0, 4), (1, 1), (1, 3), (2, 0), (2, 2), (2, 4)]
    assert sample_places([1, 0, 1]) == [(0, 0), (2, 0)]


@pytest.mark.parametrize("pixels", ["encoded", "raw"])
def test_the_sample_sheet_paints_labels_in_their_colours(tmp_path: Path, storage: Path, pixels: str) -> None:
    folder = write_folder(tmp_path / "d", train=1)
    put(folder / "images/training/p0.jpg", encoded(np.full((12, 16, 3), 100, np.uint8), ".jpg"))
    manifest = build(folder, pixels=pixels)
    path = storage / manifest.samples.path
    assert (path.stat().st_size, sha256(path)) == (manifest.samples.bytes, manifest.samples.sha256)
    sheet = decode_image(path.read_bytes(), "")
    # one tile at (32, 8), 30 times as large: row 1, column 3 is sky, its colour and grey 100 in equal parts; column 0
    # is ignored and stays as it is
    sky = class_colours(3)[0].astype(int)
    assert np.abs(sheet[32 + 45, 8 + 105] - (sky + 100) // 2).max() <= 1
    assert np.abs(sheet[32 + 45, 8 + 10].astype(int) - 100).max() <= 2


def test_classes_above_255_are_painted_too_and_only_65535_is_nothing(tmp_path: Path, storage: Path) -> None:
    names = tuple(f"class {index}" for index in range(300))
    ids = np.full((12, 16), 255, np.uint16)
    ids[6:], ids[:, 0] = 299, 65535
    folder = write_folder(tmp_path / "d", train=1, val=0)
    put(folder / "images/training/p0.jpg", encoded(np.full((12, 16, 3), 100, np.uint8), ".jpg"))
    put(folder / "annotations/training/p0.png", encoded(ids))
    settings: dict[str, Any] = {"class_names": names, "ignore_label": 65535, "splits": {"train": "training"}}
    sheets = []
    for pixels in ("encoded", "raw"):
        manifest = build(folder, pixels=pixels, **settings)
        sheets.append((storage / manifest.samples.path).read_bytes())
        assert manifest.ignore_label == 65535
        assert (manifest.pixels["train"][255], manifest.pixels["train"][299]) == (6 * 15, 6 * 15)
        assert manifest.ignored_pixels["train"] == 12
    assert sheets[0] == sheets[1]
    sheet, colours = decode_image(sheets[0], "").astype(int), class_colours(300).astype(int)
    for row, class_id in ((1, 255), (9, 299)):  # 30 times as large, from (32, 8) on
        assert np.abs(sheet[32 + 30 * row + 15, 8 + 105] - (colours[class_id] + 100) // 2).max() <= 1
    assert np.abs(sheet[32 + 45, 8 + 10] - 100).max() <= 2
