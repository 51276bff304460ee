"""The page of a dataset shows counts, names and boxes, and replaces nothing but itself."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.browse.page import LEAST_SIDE, Section, open_page, write_page, write_sample
from pipeline.browse.samples import Sample
from pipeline.prediction.annotations import Objects
from pipeline.storage.results.data import Manifest

SAMPLE = Sample(
    name="a & b",
    image=np.full((32, 48, 3), 120, np.uint8),
    objects=Objects(ids=np.zeros((32, 48), np.int32), labels=[0]),
    boxes=np.array([[8.0, 8.0, 24.0, 24.0]]),
    box_labels=[2],
)


def test_a_small_picture_is_enlarged_with_its_boxes(tmp_path: Path) -> None:
    open_page(tmp_path)
    card = write_sample(tmp_path, "x", SAMPLE, ["sky", "road", "car"], borders=False)
    drawn = cv2.imread(str(tmp_path / card.file))
    assert drawn.shape == (LEAST_SIDE * 32 // 48, LEAST_SIDE, 3)
    assert drawn[:, 80].max(1).min() < 60  # the box's left side, 8 pixels from the edge, ten times enlarged
    assert drawn[5:75, 200].max(1).min() > 60  # above the box
    assert card.note == "48 × 32, 1 object" and card.classes == {"sky": 1, "car": 1}


def test_the_page_says_how_many_pictures_hold_a_class(small_manifest: Manifest, tmp_path: Path) -> None:
    open_page(tmp_path)
    card = write_sample(tmp_path, "x", SAMPLE, small_manifest.class_names, borders=False)
    sections = [Section(title="Some", text="A few.", cards=[card]), Section(title="None", text="", cards=[])]
    write_page(tmp_path, small_manifest, sections, title="Dataset shapes", notes=["A note."])
    page = (tmp_path / "index.html").read_text()
    for place, name in enumerate(small_manifest.class_names):
        images = [small_manifest.images[split][place] for split in ("train", "val")]
        line = next(line for line in page.splitlines() if f"</i>{name}" in line and "<tr>" in line)
        assert f"<td>{images[0]}</td>" in line and f"<td>{images[1]}</td>" in line
    assert "<h2>Some</h2>" in page and "<h2>None</h2>" not in page
    assert "a &amp; b" in page and 'src="images/x.jpg"' in page


def test_images_of_somebody_elses_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/mine.jpg").write_text("mine")
    with pytest.raises(ValueError, match="holds images, which no such page does; give an empty or a new folder"):
        open_page(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "mine.jpg"]


def test_an_earlier_page_is_replaced_and_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    open_page(tmp_path / "page")
    write_sample(tmp_path / "page", "old", SAMPLE, ["sky", "road", "car"], borders=False)
    open_page(tmp_path / "page")
    assert not list((tmp_path / "page/images").iterdir())
    (tmp_path / "page/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which no such page does"):
        open_page(tmp_path / "page")
    with pytest.raises(ValueError, match=r"notes\.txt is a file"):
        open_page(tmp_path / "page/notes.txt")
