"""A folder of predictions knows what in it is whole and whose it is."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.data.images.draw import class_colours
from pipeline.prediction.annotations import Annotated, Objects
from pipeline.prediction.folder import Folder, open_folder
from pipeline.prediction.images import Picture

CLASSES = ("sky", "road", "car")


def opened(path: Path, *, task: str = "panoptic", palette: bool = False, **settings: str) -> Folder:
    return open_folder(path, {"network": "n", **settings}, class_names=CLASSES, task=task, palette=palette)


def added(folder: Folder, name: str = "a") -> None:
    ids = np.array([[0, 1], [1, -1]], np.int32)
    labels = np.array([[2, 0], [0, 255]], np.uint8)
    picture = Picture(name, f"{name}.png", "digest", np.zeros((2, 2, 3), np.uint8))
    folder.add(
        picture,
        Annotated(
            label_map=labels,
            segment_ids=np.array([[1, 70000], [70000, 0]]),
            annotations=[{"id": 1}],
            objects=Objects(ids=ids, labels=[2, 0]),
        ),
    )


def test_a_picture_is_done_when_all_of_its_files_are_there(tmp_path: Path) -> None:
    folder = opened(tmp_path / "out")
    assert not folder.is_done("a", "digest")
    added(folder)
    assert folder.is_done("a", "digest") and not folder.is_done("a", "of other bytes")
    for file in (folder.labels_file("a"), folder.overlay_file("a"), folder.panoptic_file("a")):
        kept = file.read_bytes()
        file.unlink()
        assert not opened(tmp_path / "out").is_done("a", "digest")
        file.write_bytes(kept)
    assert opened(tmp_path / "out").is_done("a", "digest")


def test_segment_ids_are_red_and_256_green_and_65536_blue(tmp_path: Path) -> None:
    folder = opened(tmp_path / "out")
    added(folder)
    rgb = cv2.imread(str(folder.panoptic_file("a")))[..., ::-1].astype(int)
    assert (rgb @ [1, 256, 65536]).tolist() == [[1, 70000], [70000, 0]]


def test_with_a_palette_indices_stay_ids_and_are_shown_in_the_classes_colours(tmp_path: Path) -> None:
    folder = opened(tmp_path / "out", palette=True)
    added(folder)
    with Image.open(folder.labels_file("a")) as indexed:
        assert np.asarray(indexed).tolist() == [[2, 0], [0, 255]]
        colours = np.asarray(indexed.convert("RGB"))
    assert colours[0, 0].tolist() == class_colours(3)[2].tolist() and colours[1, 1].tolist() == [0, 0, 0]


def test_files_of_pictures_that_are_gone_are_deleted(tmp_path: Path) -> None:
    folder = opened(tmp_path / "out")
    added(folder, "sub/a")
    added(folder, "b")
    folder.forget_others(["b"])
    assert folder.entry("sub/a") is None and not folder.labels_file("sub/a").exists() and folder.entry("b") is not None


def test_a_folder_with_other_files_or_of_other_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files than predictions; give an empty or a new folder"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt is a file; give a folder"):
        opened(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\); give a folder with --out"):
        opened(tmp_path / "notes.txt/out")
    opened(tmp_path / "out", images="a")
    with pytest.raises(ValueError, match=r"holds predictions with other settings \(images, palette\)"):
        opened(tmp_path / "out", images="b", palette=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        opened(tmp_path / "out")
    tmp_path.chmod(0o700)
