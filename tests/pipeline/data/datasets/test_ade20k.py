from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.datasets import ade20k
from pipeline.data.loader.val_images import validation_images
from pipeline.data.shards import build as shards
from pipeline.params.class_names import CLASS_NAMES
from pipeline.params.schema import DatasetConfig, TestConfig
from pipeline.storage.files import sha256
from pipeline.storage.results.data import FetchedSource
from tests.helpers.images import encoded, image, put, zipped

CONFIG = DatasetConfig(
    layout="ade20k",
    class_names=CLASS_NAMES["ade20k"],
    thing_classes=CLASS_NAMES["ade20k_things"],
    splits={"train": "training", "val": "validation"},
)
WALL, SKY, BED, PERSON = (CLASS_NAMES["ade20k"].index(name) for name in ("wall", "sky", "bed", "person"))

# walls (1) and sky (3) with beds (8) and a person (13); 0 is nothing
SEMANTIC = np.array([[1, 1, 1, 8], [3, 8, 8, 13], [0, 8, 3, 13]], np.uint8)
# the first category is bed, the fourth person: one bed over a wall and a bed, another, a person over sky
CATEGORY = np.array([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 4, 4]], np.uint8)
NUMBER = np.array([[0, 0, 7, 7], [0, 3, 0, 0], [0, 0, 9, 9]], np.uint8)


def archives(folder: Path, category: np.ndarray = CATEGORY, semantic: np.ndarray = SEMANTIC) -> list[Path]:
    """A zip archive and a tar archive as they are published, with one picture in each split."""
    for split in ("training", "validation"):
        name = f"{split}/ADE_{split}_00000001"
        put(folder / f"s/ADEChallengeData2016/images/{name}.jpg", encoded(image(*semantic.shape), ".jpg"))
        put(folder / f"s/ADEChallengeData2016/annotations/{name}.png", encoded(semantic))
        objects = np.stack((category, NUMBER, np.zeros_like(NUMBER)), axis=2)
        put(folder / f"i/annotations_instance/{name}.png", encoded(objects))
    with tarfile.open(folder / "annotations_instance.tar", "w") as file:
        file.add(folder / "i/annotations_instance", "annotations_instance")
    return [zipped(folder / "s", folder / "ADEChallengeData2016.zip"), folder / "annotations_instance.tar"]


def test_things_are_100_of_the_150_classes_in_their_order() -> None:
    things = CLASS_NAMES["ade20k_things"]
    assert len(things) == 100
    assert (things[0], things[3], things[99]) == ("bed", "person", "flag")  # the challenge's categories 1, 4 and 100
    assert not {"wall", "sky", "floor", "road", "grass"} & {*things}


@pytest.mark.parametrize("unpacked", [False, True])
def test_objects_lie_over_stuff_and_things_without_objects_are_nothing(tmp_path: Path, unpacked: bool) -> None:
    sources = archives(tmp_path)
    if unpacked:  # all in one folder, as the authors' instructions have it
        (tmp_path / "i/annotations_instance").rename(tmp_path / "s/ADEChallengeData2016/annotations_instance")
        sources = [tmp_path / "s"]
    (record,) = ade20k.records(CONFIG, sources, "val")
    assert record.name == "ADE_validation_00000001"
    read = record.read()
    # stuff by class, then objects by number: 3, 7, 9
    assert read.segment_classes == (WALL, SKY, BED, BED, PERSON)
    assert read.segments.tolist() == [[0, 0, 3, 3], [1, 2, 255, 255], [255, 255, 4, 4]]
    assert read.segment_crowd == ()
    assert read.label_map.tolist() == [[WALL, WALL, WALL, BED], [SKY, BED, BED, PERSON], [255, BED, SKY, PERSON]]


def test_pixels_count_by_the_semantic_labels_and_segments_by_the_objects(tmp_path: Path, storage: Path) -> None:
    sources = archives(tmp_path)
    facts = [FetchedSource(name=each.name, path="archives/00/folder.json", bytes=1, sha256=sha256(each))
             for each in sources]  # fmt: skip
    manifest = shards.build("ade20k", CONFIG, sources, facts=facts, processes=0)
    (val_image,) = validation_images(manifest, TestConfig(short_side=32, long_side_max=64), task="panoptic")
    assert val_image.label_map is not None and val_image.segments is not None and val_image.instances is not None
    assert val_image.label_map[0].tolist() == [WALL, WALL, WALL, BED]
    assert val_image.segments[0].tolist() == [0, 0, 3, 3]
    assert val_image.instances.labels.tolist() == [BED, BED, PERSON]
    assert val_image.instances.areas.tolist() == [1, 2, 2]


def covered() -> np.ndarray:
    """The same, with a class of stuff (floor, 4) below an object alone."""
    semantic = SEMANTIC.copy()
    semantic[1, 1] = 4
    return semantic


def test_stuff_that_objects_cover_is_missed_as_the_official_evaluator_says(tmp_path: Path, storage: Path) -> None:
    sources = archives(tmp_path, semantic=covered())
    (record,) = ade20k.records(CONFIG, sources, "val")
    read = record.read()
    assert read.segment_classes == (WALL, SKY, CLASS_NAMES["ade20k"].index("floor"), BED, BED, PERSON)
    assert 2 not in read.segments
    facts = [FetchedSource(name=each.name, path="archives/00/folder.json", bytes=1, sha256=sha256(each))
             for each in sources]  # fmt: skip
    manifest = shards.build("ade20k", CONFIG, sources, facts=facts, processes=0)
    (val_image,) = validation_images(manifest, TestConfig(short_side=32, long_side_max=64), task="panoptic")
    assert val_image.labels.tolist() == list(read.segment_classes)


@pytest.mark.parametrize(
    ("category", "message"),
    [
        (np.where(NUMBER == 7, 101, CATEGORY), "green 7 has red 101; it must be one category, 1 to 100"),
        (np.where(CATEGORY == 4, [[1, 1, 4, 3]], CATEGORY), "green 9 has red 3 and 4"),
        (np.zeros_like(CATEGORY), "green 3 has red 0"),
    ],
)
def test_a_wrong_object_is_named(tmp_path: Path, category: Any, message: str) -> None:
    (record,) = ade20k.records(CONFIG, archives(tmp_path, category.astype(np.uint8)), "train")
    with pytest.raises(ValueError, match=f"annotations_instance/.*png: the object with {message}"):
        record.read()


def test_an_object_file_of_grey_values_is_refused(tmp_path: Path) -> None:
    archives(tmp_path)
    put(tmp_path / "i/annotations_instance/training/ADE_training_00000001.png", encoded(CATEGORY))
    (record,) = ade20k.records(CONFIG, [tmp_path / "s", tmp_path / "i"], "train")
    with pytest.raises(
        ValueError, match="annotations_instance/.*png holds grey values; an object has its category as red"
    ):
        record.read()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    images, objects = archives(tmp_path)
    with pytest.raises(ValueError, match=r"no folder annotations_instance/ in .*\.zip \(found ADE"):
        ade20k.records(CONFIG, [images], "train")
    put(tmp_path / "b/x/y.png", b"")
    with pytest.raises(ValueError, match=r"no folder images/ in .*\.tar, .*/b \(found annotations_instance, x\);"):
        ade20k.records(CONFIG, [objects, tmp_path / "b"], "train")
    (tmp_path / "i/annotations_instance/training/ADE_training_00000001.png").unlink()
    with pytest.raises(ValueError, match="has no label annotations_instance/training/ADE_training_00000001.png"):
        ade20k.records(CONFIG, [images, tmp_path / "i"], "train")
    with pytest.raises(ValueError, match="thing_classes lists 0 of 150"):
        ade20k.records(dataclasses.replace(CONFIG, thing_classes=()), [images, objects], "train")
    (record,) = ade20k.records(CONFIG, archives(tmp_path / "b", semantic=np.full((3, 4), 151, np.uint8)), "train")
    with pytest.raises(ValueError, match="annotations/.*holds label 151 on 12 pixels, which is no class: 0 to 150"):
        record.read()
