from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.datasets import folder
from tests.helpers.images import config, encoded, image, labels, put, write_folder, zipped
from tests.helpers.shared import shared


@pytest.mark.parametrize("top", ["", "camvid"])
@pytest.mark.parametrize("archived", [False, True])
def test_a_folder_and_an_archive_give_the_same_records(tmp_path: Path, archived: bool, top: str) -> None:
    source = write_folder(tmp_path / "data", top=top)
    if archived:
        source = zipped(source, tmp_path / "data.zip")
    records = folder.records(config(), [source], "train")
    assert [record.name for record in records] == ["p0", "p1", "p2"]
    read = records[1].read()
    assert read.image == encoded(image(seed=1), ".jpg")
    assert read.segment_classes is None
    expected = labels()
    expected[:, 0] = 255  # the ignore label
    np.testing.assert_array_equal(read.segments, expected)


def test_label_offset_turns_ade20k_zero_into_nothing(tmp_path: Path) -> None:
    source = write_folder(tmp_path, train=1, val=0)
    put(tmp_path / "annotations/training/p0.png", encoded(np.repeat(np.array([[0, 1, 2, 3]], np.uint8), 4, 0)))
    settings = config(label_offset=-1, ignore_label=255)
    read = folder.records(settings, [source], "train")[0].read()
    assert read.segments[0].tolist() == [255, 0, 1, 2]


def test_palette_labels_are_read_as_indices_not_as_colours(tmp_path: Path) -> None:
    source = write_folder(tmp_path, train=1, val=0)
    image = Image.fromarray(labels(), mode="P")
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200] * 85)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    put(tmp_path / "annotations/training/p0.png", buffer.getvalue())
    read = folder.records(config(), [source], "train")[0].read()
    assert set(np.unique(read.segments)) == {0, 1, 2, 255}


@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_labels_of_any_depth_are_read_as_ids(tmp_path: Path, bits: int) -> None:
    source = write_folder(tmp_path, train=1, val=0)
    ids = np.array([[0, 1], [1, 0]])
    if bits in (2, 4):  # Pillow writes these only with a palette
        data = _grey_png(ids, bits)
    else:
        buffer = io.BytesIO()
        Image.fromarray(ids.astype(bool if bits == 1 else np.uint16)).save(buffer, "PNG")
        data = buffer.getvalue()
    put(tmp_path / "annotations/training/p0.png", data)
    assert folder.records(config(), [source], "train")[0].read().segments.tolist() == ids.tolist()


def _grey_png(ids: np.ndarray, bits: int) -> bytes:
    import struct
    import zlib

    def chunk(chunk_type: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + chunk_type + body + struct.pack(">I", zlib.crc32(chunk_type + body))

    rows = b"".join(b"\0" + bytes([sum(int(v) << (8 - bits * (i + 1)) for i, v in enumerate(row))]) for row in ids)
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_label_outside_the_classes_names_file_value_and_pixels(tmp_path: Path) -> None:
    source = write_folder(tmp_path, train=1, val=0)
    ids = labels()
    ids[3, 2:7] = 7
    put(tmp_path / "annotations/training/p0.png", encoded(ids))
    with pytest.raises(ValueError, match=r"annotations/training/p0\.png holds label 7 on 5 pixels.*0 to 2.*label: 9"):
        folder.records(config(), [source], "train")[0].read()
    put(tmp_path / "annotations/training/p0.png", encoded(ids.astype(np.uint16) * 300))
    with pytest.raises(ValueError, match="holds label 300 on 82 pixels"):  # road: 6 x 15 pixels without 2 x 4 of a car
        folder.records(config(), [source], "train")[0].read()


def test_labels_in_colours_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path, train=1, val=0)
    put(tmp_path / "annotations/training/p0.png", encoded(image()))
    with pytest.raises(ValueError, match=r"p0\.png holds colours, not class ids; .* `palette`"):
        folder.records(config(), [source], "train")[0].read()


@pytest.mark.parametrize("archived", [False, True])
def test_image_without_label_and_label_without_image_are_named(tmp_path: Path, archived: bool) -> None:
    source = write_folder(tmp_path / "data")
    (source / "annotations/training/p1.png").unlink()
    read = zipped(source, tmp_path / "a.zip") if archived else source
    with pytest.raises(ValueError, match=r"images/training/p1\.jpg has no label annotations/training/p1\.png"):
        folder.records(config(), [read], "train")
    (source / "images/validation/p0.jpg").unlink()
    read = zipped(source, tmp_path / "b.zip") if archived else source
    with pytest.raises(ValueError, match=r"annotations/validation/p0\.png has no image in images/validation/"):
        folder.records(config(), [read], "val")


def test_an_empty_split_and_a_missing_layout_say_what_is_expected(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "data", val=0)
    with pytest.raises(ValueError, match=r"has no images in images/validation/ for split val.*`splits`"):
        folder.records(config(), [source], "val")
    put(tmp_path / "other/pictures/a.jpg", b"")
    with pytest.raises(ValueError, match=r"has no folder images/ \(found pictures\); see docs/own-data.md"):
        folder.records(config(), [tmp_path / "other"], "train")


def test_two_pictures_of_one_name_are_refused_and_hidden_files_are_not_pictures(tmp_path: Path) -> None:
    source = write_folder(tmp_path, train=1)
    put(tmp_path / "images/training/._p0.jpg", b"resource fork")
    put(tmp_path / "__MACOSX/images/training/p9.jpg", b"")
    assert len(folder.records(config(), [source], "train")) == 1
    put(tmp_path / "images/training/p0.png", encoded(image()))
    with pytest.raises(ValueError, match=r"images/training/p0\.jpg and images/training/p0\.png have the same name"):
        folder.records(config(), [source], "train")


def test_the_real_sample_archives_are_read_in_place() -> None:
    classes = tuple(f"class {index}" for index in range(150))
    ade20k = config(class_names=classes, label_offset=-1, ignore_label=255)
    records = folder.records(ade20k, [shared("data/ADEChallengeData2016-sample.zip")], "val")
    assert [record.name for record in records] == [f"ADE_val_0000000{index}" for index in (1, 2, 3)]
    assert all(record.read().segments.max() in (*range(150), 255) for record in records)
    camvid = config(class_names=classes[:11], ignore_label=11)
    archive = shared("data/camvid.zip")
    assert [len(folder.records(camvid, [archive], split)) for split in ("train", "val")] == [367, 101]
