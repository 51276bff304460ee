from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.datasets import voc
from pipeline.params.schema import DatasetConfig
from tests.helpers.images import config, encoded, image, labels, put, zipped


def write_voc(folder: Path, top: str = "VOCdevkit/VOC2012/", lists: dict[str, str] | None = None) -> Path:
    """Three pictures, p0 to p2, the last without a label; the lists name the first two."""
    for index in range(3):
        put(folder / f"{top}JPEGImages/p{index}.jpg", encoded(image(seed=index), ".jpg"))
    for index in range(2):
        put(folder / f"{top}SegmentationClass/p{index}.png", encoded(labels()))
    for name, text in (lists or {"train": "p1\r\np0\r\n\n", "val": "p1\n"}).items():
        put(folder / f"{top}ImageSets/Segmentation/{name}.txt", text.encode())
    put(folder / f"{top}ImageSets/Main/train.txt", b"p2 -1\n")
    return folder


def settings(**changes: Any) -> DatasetConfig:
    return config(layout="voc", splits={"train": "train", "val": "val"}, **changes)


@pytest.mark.parametrize("top", ["", "VOCdevkit/VOC2012/"])
@pytest.mark.parametrize("archived", [False, True])
def test_lists_name_the_pictures_of_a_split(tmp_path: Path, archived: bool, top: str) -> None:
    source = write_voc(tmp_path / "data", top)
    if archived:
        source = zipped(source, tmp_path / "data.zip")
    assert [record.name for record in voc.records(settings(), [source], "train")] == ["p0", "p1"]
    (record,) = voc.records(settings(), [source], "val")
    read = record.read()
    assert read.image == encoded(image(seed=1), ".jpg")
    np.testing.assert_array_equal(read.segments, np.where(labels() == 9, 255, labels()))


def test_colours_and_suffixes_are_as_in_the_layout_folder(tmp_path: Path) -> None:
    source = write_voc(tmp_path, "", {"train": "p2"})
    put(source / "SegmentationClass/p2_gt.png", encoded(np.array([[[9, 9, 8]]], np.uint8)))
    palette = {"sky": ((1, 1, 1),), "road": ((2, 2, 2),), "car": ((9, 9, 8),)}
    (record,) = voc.records(settings(palette=palette, label_suffix="_gt"), [source], "train")
    segments = record.read().segments
    assert segments is not None and segments.tolist() == [[2]]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            {"trainval": "p0"},
            r"has no ImageSets/Segmentation/train\.txt; there are lists called trainval: name",
        ),
        ({"train": "p0\np9\n"}, r"train\.txt lists p9, but there is no JPEGImages/p9\.jpg; lines are names without"),
        ({"train": "JPEGImages/p0.jpg"}, r"lists JPEGImages/p0\.jpg, but there is no"),
        ({"train": "p0\np1\np0\n"}, r"train\.txt lists p0 2 times; keep one of them"),
        ({"train": "p2"}, r"JPEGImages/p2\.jpg has no label SegmentationClass/p2\.png"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(tmp_path: Path, lists: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        voc.records(settings(), [write_voc(tmp_path, "", lists)], "train")


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    source = write_voc(tmp_path, "")
    put(source / "ImageSets/Segmentation/train.txt", b"p0\xff\n")
    with pytest.raises(ValueError, match=r"ImageSets/Segmentation/train\.txt is no UTF-8 text"):
        voc.records(settings(), [source], "train")


def test_a_source_without_lists_or_of_two_years_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "other/JPEGImages/a.jpg", b"")
    with pytest.raises(ValueError, match=r"other has no ImageSets/Segmentation/<split>\.txt; `sources` names"):
        voc.records(settings(), [tmp_path / "other"], "train")
    both = write_voc(write_voc(tmp_path / "both"), "VOCdevkit/VOC2007/")
    with pytest.raises(ValueError, match=r"has several: VOCdevkit/VOC2007/ImageSets/Segmentation/, VOCdevkit/VOC2012/"):
        voc.records(settings(), [both], "train")
    with pytest.raises(ValueError, match="layout voc reads one source, found 2"):
        voc.records(settings(), [both, both], "train")
