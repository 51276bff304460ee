from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.datasets import vistas
from pipeline.params.class_names import CLASS_NAMES
from pipeline.params.schema import DatasetConfig
from tests.helpers.images import encoded, image, put, zipped

CLASSES = CLASS_NAMES["vistas"]
CONFIG = DatasetConfig(
    layout="vistas",
    class_names=CLASSES,
    thing_classes=CLASS_NAMES["vistas_things"],
    splits={"train": "training", "val": "validation"},
)
BIRD, ROAD, CAR = 1, 14, 56
"""Category ids: a class's place, from 1 on."""

# by red, with green 0: 1 is a road, 2 and 3 are cars, 4 a crowd of birds, 0 is unlabelled
IDS = np.array([[1, 1, 2, 2], [1, 3, 3, 0], [4, 4, 1, 0]], np.uint8)
INFOS = [
    {"id": 1, "category_id": ROAD, "iscrowd": 0, "bbox": [0, 0, 3, 3], "area": 4},
    {"id": 2, "category_id": CAR, "iscrowd": 0, "bbox": [2, 0, 2, 1], "area": 2},
    {"id": 3, "category_id": CAR, "iscrowd": 0, "bbox": [1, 1, 2, 1], "area": 2},
    {"id": 4, "category_id": BIRD, "iscrowd": 1, "bbox": [0, 2, 2, 1], "area": 2},
]


def write(folder: Path, within: str = "", **changes: Any) -> Path:
    """One training picture as the archive holds it; `within`: where version 2.0 has the labels of 1.2."""
    put(folder / "training/images/-0_Gj.jpg", encoded(image(*IDS.shape), ".jpg"))
    colours = np.stack((IDS, 0 * IDS, 0 * IDS), axis=2)
    put(folder / f"training/{within}panoptic/-0_Gj.png", encoded(colours))
    put(folder / f"training/{within}labels/-0_Gj.png", encoded(IDS))
    picture = {"id": "-0_Gj", "file_name": "-0_Gj.jpg", "height": 3, "width": 4, **changes}
    listing = {
        "images": [picture],
        "annotations": [{"image_id": picture["id"], "file_name": "-0_Gj.png", "segments_info": INFOS}],
        "categories": [
            {"id": number, "name": name, "isthing": int(name in CONFIG.thing_classes), "supercategory": "object"}
            for number, name in enumerate(CLASSES, 1)
        ],
    }
    put(folder / f"training/{within}panoptic/panoptic_2018.json", json.dumps(listing).encode())
    return folder


def test_there_are_37_things_and_28_classes_of_stuff() -> None:
    assert (len(CLASSES), len(CONFIG.thing_classes)) == (65, 37)
    assert {"Bird", "Car", "Crosswalk - Plain"} < {*CONFIG.thing_classes}
    assert not {"Road", "On Rails", "Pothole", "Ego Vehicle"} & {*CONFIG.thing_classes}


@pytest.mark.parametrize("within", ["", "v1.2/"])
@pytest.mark.parametrize("archived", [False, True])
def test_segments_are_those_of_the_panoptic_labels(tmp_path: Path, within: str, archived: bool) -> None:
    source = write(tmp_path / "d", within)
    if archived:
        source = zipped(source, tmp_path / "vistas.zip")
    (record,) = vistas.records(CONFIG, [source], "train")
    assert record.name == "-0_Gj"
    read = record.read()
    assert [CLASSES[class_id] for class_id in read.segment_classes] == ["Road", "Car", "Car", "Bird"]
    assert read.segment_crowd == (False, False, False, True)
    assert read.segments.tolist() == [[0, 0, 1, 1], [0, 2, 2, 255], [3, 3, 0, 255]]


@pytest.mark.parametrize(("identity", "message"), [("7", "its id is '7'; .*without quotes"), ("", "its id is ''")])
def test_an_id_in_text_is_no_number(tmp_path: Path, identity: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vistas.records(CONFIG, [write(tmp_path, id=identity)], "train")


def test_labels_that_are_missing_or_of_another_version_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "d")
    message = (
        r"split {0} has no {1}/panoptic/panoptic_2018.json or {1}/v1.2/panoptic/panoptic_2018.json in d \(found {2}\);"
    )
    found = "training/panoptic/panoptic_2018.json"
    with pytest.raises(ValueError, match=message.format("val", "validation", found)):
        vistas.records(CONFIG, [source], "val")
    (source / "training/v2.0").mkdir()
    (source / "training/panoptic").rename(source / "training/v2.0/panoptic")
    found = "training/v2.0/panoptic/panoptic_2018.json"
    with pytest.raises(ValueError, match=message.format("train", "training", found)):
        vistas.records(CONFIG, [source], "train")
