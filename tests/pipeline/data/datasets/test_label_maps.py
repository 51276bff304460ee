"""What a dataset's settings make of label files; by the layout folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.datasets import folder
from tests.helpers.images import config, encoded, image, put

PALETTE = {"sky": ((0, 0, 200),), "road": ((90, 90, 90), (100, 100, 100)), "car": ((200, 0, 0),)}


def read(source: Path, ids: Any, name: str = "p0.png", **changes: Any) -> np.ndarray:
    """The segments of a data set of one picture whose label file holds these ids or colours, or is these bytes."""
    put(source / "images/training/p0.jpg", encoded(image(1, 4), ".jpg"))
    put(source / "annotations/training" / name, ids if isinstance(ids, bytes) else encoded(ids))
    (record,) = folder.records(config(**changes), [source], "train")
    segments = record.read().segments
    assert segments is not None
    return segments


def tiff(ids: list[int]) -> bytes:
    """One row of int32."""
    buffer = io.BytesIO()
    Image.fromarray(np.array([ids], np.int32)).save(buffer, "TIFF")
    return buffer.getvalue()


def row(*ids: int) -> np.ndarray:
    return np.array([ids], np.uint8)


# Names


def test_labels_may_have_a_suffix_and_others_beside_them_are_left_alone(tmp_path: Path) -> None:
    put(tmp_path / "annotations/training/p0_colours.png", b"for people")
    assert read(tmp_path, row(0, 1, 2, 9), "p0_mask.png", label_suffix="_mask").tolist() == [[0, 1, 2, 255]]


def test_a_label_of_another_format_is_found_by_its_name(tmp_path: Path) -> None:
    assert read(tmp_path, tiff([0, 1, 2, 9]), "p0.TIF").tolist() == [[0, 1, 2, 255]]


@pytest.mark.parametrize(
    ("name", "suffix", "message"),
    [
        ("p0_mask.png", "", r"annotations/training/p0\.png; for .*p0_mask\.png, set `label_suffix: _mask`$"),
        ("p0.jpg", "", r"annotations/training/p0\.png; .*p0\.jpg is none: known suffixes of labels are \.png \.tif"),
        ("p0.png", "_mask", r"annotations/training/p0_mask\.png$"),
        ("p0_mask.npy", "_mask", r"annotations/training/p0_mask\.png; .*p0_mask\.npy is none: known suffixes"),
    ],
)
def test_a_missing_label_says_what_is_there_instead(tmp_path: Path, name: str, suffix: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"images/training/p0\.jpg has no label " + message):
        read(tmp_path, row(0, 1, 2, 9), name, label_suffix=suffix)


def test_two_label_files_of_one_picture_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "annotations/training/p0.bmp", b"")
    with pytest.raises(ValueError, match=r"p0\.bmp and annotations/training/p0\.png have the same name; keep one"):
        read(tmp_path, row(0, 1, 2, 9))


# Ids


def test_several_ids_may_be_ignored_or_none(tmp_path: Path) -> None:
    assert read(tmp_path, row(0, 2, 7, 255), ignore_label=(7, 255)).tolist() == [[0, 2, 255, 255]]
    with pytest.raises(ValueError, match=r"holds label 7 on 1 pixels \(and 1 other ids that are none\)"):
        read(tmp_path, row(0, 2, 7, 255), ignore_label=())


def test_an_ignored_id_above_255_is_one_of_16_bits(tmp_path: Path) -> None:
    for value in (300, 65535):
        ids = np.array([[0, 1, 2, value]], np.uint16)
        assert read(tmp_path, ids, ignore_label=value).tolist() == [[0, 1, 2, 255]]


def test_a_negative_id_is_ignored_where_ignore_label_says_so_and_an_error_otherwise(tmp_path: Path) -> None:
    data = tiff([0, 1, 2, -1])
    assert read(tmp_path, data, "p0.tif", ignore_label=-1).tolist() == [[0, 1, 2, 255]]
    with pytest.raises(ValueError, match=r"p0\.tif holds label -1 on 1 pixels, which is outside the classes, 0 to 2"):
        read(tmp_path, data, "p0.tif", ignore_label=255)


def test_255_with_an_offset_says_what_becomes_of_it_and_how_to_ignore_it(tmp_path: Path) -> None:
    message = (
        r"holds label 255 on 1 pixels, which label_offset -1 makes 254: outside the classes, 0 to 2, and not ignored "
        r"\(ignore_label: 255\); to ignore it too, set ignore_label: \[255, 254\]$"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path, row(0, 1, 3, 255), label_offset=-1, ignore_label=255)
    found = read(tmp_path, row(0, 1, 3, 255), label_offset=-1, ignore_label=(255, 254))
    assert found.tolist() == [[255, 0, 2, 255]]


def test_an_offset_brings_no_id_round_to_the_first_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds label 255 on 1 pixels, which label_offset 1 makes 256"):
        read(tmp_path, row(0, 1, 1, 255), label_offset=1)


# Colours


def test_colours_become_classes_by_the_palette(tmp_path: Path) -> None:
    colours = np.array([[[200, 0, 0], [90, 90, 90], [100, 100, 100], [0, 0, 200]]], np.uint8)
    assert read(tmp_path, colours, palette=PALETTE).tolist() == [[2, 1, 1, 0]]
    colours[0, 3] = 1
    with pytest.raises(ValueError, match=r"p0\.png holds the colour \[1, 1, 1\] on 1 pixels, which `palette` does not"):
        read(tmp_path, colours, palette=PALETTE)
    palette = {**PALETTE, "ignore": ((7, 7, 7), (1, 1, 1))}
    assert read(tmp_path, colours, palette=palette).tolist() == [[2, 1, 1, 255]]


def test_binary_masks_of_0_and_255_are_two_classes_by_a_palette(tmp_path: Path) -> None:
    palette = {"background": ((0, 0, 0),), "object": ((255, 255, 255),)}
    names = ("background", "object")
    assert read(tmp_path, row(0, 255, 255, 0), class_names=names, palette=palette).tolist() == [[0, 1, 1, 0]]
    with pytest.raises(
        ValueError, match=r"holds label 255 on 2 pixels.*; for masks of 0 and 255, give both as colours"
    ):
        read(tmp_path, row(0, 255, 255, 0), class_names=names)


# More classes than fit into 8 bits


@pytest.mark.parametrize(
    ("classes", "stored", "expected", "dtype"),
    [
        (255, [0, 254, 300, 300], [0, 254, 255, 255], np.uint8),
        (256, [0, 254, 255, 300], [0, 254, 255, 65535], np.uint16),
    ],
)
def test_labels_of_more_than_255_classes_are_wide(
    tmp_path: Path, classes: int, stored: list[int], expected: list[int], dtype: type
) -> None:
    names = tuple(f"class {index}" for index in range(classes))
    found = read(tmp_path, np.array([stored], np.uint16), class_names=names, ignore_label=300)
    assert (found.tolist(), found.dtype) == ([expected], dtype)


def test_an_offset_makes_0_of_more_than_255_classes_65535(tmp_path: Path) -> None:
    names = tuple(f"class {index}" for index in range(300))
    ids = np.array([[0, 1, 256, 300]], np.uint16)
    found = read(tmp_path, ids, class_names=names, label_offset=-1, ignore_label=65535)
    assert found.tolist() == [[65535, 0, 255, 299]]
